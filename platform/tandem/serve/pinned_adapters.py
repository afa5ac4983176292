"""Pinned adapters of a base model, read from the registry when it has changed."""

from __future__ import annotations

from collections.abc import Callable

from tandem.engine.protocol import AdapterRef
from tandem.registry import Registry


class PinnedAdapters:
    """Pinned adapters of one base model.

    The directory reads the registry's revision for all replicas: replicas query the database only after a change.
    """

    def __init__(self, base: str, registry: Callable[[], Registry]) -> None:
        self._base = base
        self._open = registry
        self._revision: int | None = None
        self._known: list[AdapterRef] | None = None

    def is_behind(self, revision: int) -> bool:
        """Whether the registry has changed since the last `read`; `revision` is the registry's count of changes now."""
        return revision != self._revision

    def read(self, revision: int) -> list[AdapterRef] | None:
        """The pinned adapters if they differ from the last call's, else None; RegistryError if the database fails."""
        with self._open() as registry:
            found = [AdapterRef.of(record) for record in registry.pinned(self._base) if not record.dora]
        # A change after `revision` was read increases it, and is read next time.
        self._revision = revision
        if found == (self._known or []):
            return None
        self._known = found
        return found
