"""Key-value store of the connected Ray cluster (its GCS): values live as long as the cluster."""

from __future__ import annotations

from ray.experimental import internal_kv

NAMESPACE = b"tandem"


def get(key: str) -> bytes | None:
    """The value of a key; None: there is none."""
    value: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE)
    return value


def put(key: str, value: bytes) -> None:
    """Set or replace a value."""
    internal_kv._internal_kv_put(key.encode(), value, overwrite=True, namespace=NAMESPACE)


def get_or_put(key: str, value: bytes) -> bytes:
    """The value of a key, which becomes `value` where it has none yet; of processes that do this at once, one decides."""
    internal_kv._internal_kv_put(key.encode(), value, overwrite=False, namespace=NAMESPACE)
    stored = get(key)
    return value if stored is None else stored
