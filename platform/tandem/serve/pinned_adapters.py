"""Pinned adapters of a base model, read from the registry when it has changed."""

from __future__ import annotations

from collections.abc import Callable

from tandem.engine.protocol import AdapterRef
from tandem.registry import Registry


class PinnedAdapters:
    """The pinned adapters of one base, read again when the registry has changed.

    The directory follows the registry's revision for all replicas: a thousand of them hold no connection to the database, and ask
    nothing of it while nothing changes.
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
        """The pinned adapters if they are others than at the last call, else None; RegistryError if the database fails."""
        with self._open() as registry:
            found = [AdapterRef.of(record) for record in registry.pinned(self._base) if not record.dora]
        # A change that came after `revision` was read makes it another one, and is read again.
        self._revision = revision
        if found == (self._known or []):
            return None
        self._known = found
        return found
