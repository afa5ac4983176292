"""Which replicas there are. Holds nothing but their heartbeats, so a new directory is whole again in one beat."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from tandem.serve.records import ReplicaRecord, Snapshot

HEARTBEAT_S = 1.0
"""How often a replica speaks, and a gateway hears of loads; changes travel at once."""
SILENCE_S = 10.0
"""How long a replica may be silent before it counts as lost."""
FORGET_S = 60.0
"""How long a lost one is still listed, so that each gateway hears of it and ends what it had asked of it."""


@dataclass(slots=True)
class Ledger:
    """The directory's state. Pure: callers pass the clock (seconds)."""

    born: int = field(default_factory=time.time_ns)
    """Versions start here: a restarted directory must not repeat one that a gateway has seen."""
    version: int = 0
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    heard: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.version = self.version or self.born

    def hear(self, record: ReplicaRecord, now: float) -> bool:
        """Take a heartbeat; whether it changes more than loads."""
        known = self.records.get(record.id)
        self.records[record.id] = record
        self.heard[record.id] = now
        return self._changed(known is None or _lasting(known) != _lasting(record))

    def forget(self, replica_id: str) -> bool:
        """Drop a replica; whether it was there."""
        self.heard.pop(replica_id, None)
        return self._changed(self.records.pop(replica_id, None) is not None)

    def mark_silent(self, now: float) -> bool:
        """Mark those not heard for `SILENCE_S`, and drop them when they are forgotten; whether that changed anything."""
        before = self.version
        for replica_id, heard in list(self.heard.items()):
            record = self.records[replica_id]
            if now - heard > FORGET_S:
                self.forget(replica_id)
            elif now - heard > SILENCE_S and record.state != "silent":
                self.records[replica_id] = replace(record, state="silent")
                self._changed(True)
        return self.version != before

    def snapshot(self) -> Snapshot:
        """All replicas now."""
        return Snapshot(version=self.version, replicas=tuple(self.records.values()), born=self.born)

    def _changed(self, changed: bool) -> bool:
        self.version += changed
        return changed


class Directory:
    """The ledger as a Serve deployment: replicas call `heartbeat`, gateways call `watch`."""

    def __init__(self) -> None:
        self._ledger = Ledger()
        self._change = asyncio.Event()

    async def heartbeat(self, record: ReplicaRecord) -> None:
        """Take what a replica says of itself."""
        self._note(self._ledger.hear(record, time.monotonic()))

    async def leave(self, replica_id: str) -> None:
        """Drop a replica that is about to end."""
        self._note(self._ledger.forget(replica_id))

    async def watch(self, version: int) -> Snapshot:
        """The snapshot: at once if it is not of `version`, else at the next change, and after a beat for the loads."""
        self._note(self._ledger.mark_silent(time.monotonic()))
        if version == self._ledger.version:
            change = self._change
            try:
                await asyncio.wait_for(change.wait(), HEARTBEAT_S)
            except TimeoutError:
                self._note(self._ledger.mark_silent(time.monotonic()))
        return self._ledger.snapshot()

    def _note(self, changed: bool) -> None:
        if changed:
            self._change.set()
            self._change = asyncio.Event()


def _lasting(record: ReplicaRecord) -> ReplicaRecord:
    """The record without what changes with every request."""
    return replace(record, running=0, waiting=0, kv_usage=0.0, slots=())
