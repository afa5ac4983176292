"""What the registry says of a replica's adapters: their files, and which of them the replica is to keep loaded."""

from __future__ import annotations

from collections.abc import Callable

from tandem.engine.protocol import AdapterRef
from tandem.registry import ModelRecord, Registry


def ref_of(record: ModelRecord) -> AdapterRef:
    """A registered adapter as replicas need to know it."""
    return AdapterRef(id=record.id, path=record.location, digest=record.digest)


class Pins:
    """Follows the pins of one base: one small query each time it is asked, and a second one after a change."""

    def __init__(self, base: str, registry: Callable[[], Registry]) -> None:
        self._base = base
        self._open = registry
        self._registry: Registry | None = None
        self._revision: int | None = None
        self._known: list[AdapterRef] | None = None

    def changed(self) -> list[AdapterRef] | None:
        """The pinned adapters if they are others than at the last call, else None; RegistryError if the database fails."""
        if self._registry is None:
            self._registry = self._open()
        revision = self._registry.revision()
        if revision == self._revision:
            return None
        found = [ref_of(record) for record in self._registry.pinned(self._base) if not record.dora]
        # A change that comes in between is seen at the next call: the revision is the one from before.
        self._revision = revision
        if found == (self._known or []):
            return None
        self._known = found
        return found
