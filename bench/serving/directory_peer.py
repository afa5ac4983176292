"""The peer of bench.serving.directory: the directory as it was. Heartbeats are whole records, gateways get whole snapshots.

Replicas call `heartbeat` and gateways `watch` on a Ray actor. Kept here to be measured, as Tandem had it up to version 0.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.router import Router

HEARTBEAT_S = 1.0
MIN_UPDATE_INTERVAL_S = 0.05
SIZED_EVERY = 10
"""Of so many snapshots one is pickled again by its receiver, for its size."""


@dataclass(slots=True)
class ReplicaTable:
    """Replicas by id, and a version that increases with every change but one of load."""

    version: int = field(default_factory=time.time_ns)
    records: dict[str, ReplicaRecord] = field(default_factory=dict)

    def update(self, record: ReplicaRecord) -> bool:
        """Apply a heartbeat; whether more than loads changed."""
        previous = self.records.get(record.id)
        self.records[record.id] = record
        changed = previous is None or _without_load(previous) != _without_load(record)
        self.version += changed
        return changed


def _without_load(record: ReplicaRecord) -> ReplicaRecord:
    return replace(record, running=0, waiting=0, kv_usage=0.0, slots=())


class SnapshotDirectory:
    """The directory, as an actor."""

    def __init__(self) -> None:
        self._table = ReplicaTable()
        self._change = asyncio.Event()

    async def heartbeat(self, record: ReplicaRecord) -> int:
        """Apply a replica's heartbeat."""
        if self._table.update(record):
            self._change.set()
            self._change = asyncio.Event()
        return 0

    async def watch(self, version: int) -> Snapshot:
        """All replicas: at once if their version is not `version`, else at the next change or after a second."""
        if version == self._table.version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._change.wait(), HEARTBEAT_S)
        return Snapshot(version=self._table.version, replicas=tuple(self._table.records.values()))

    async def cpu_s(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()


class SnapshotReporter:
    """Sends one replica's heartbeats."""

    def __init__(self, directory: Any, record: Callable[[], ReplicaRecord]) -> None:
        self._directory = directory
        self._record = record
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self, timeout_s: float) -> None:
        """Begin to send; returns after the first heartbeat was answered."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._send(), timeout_s)
        self._task = asyncio.create_task(self._send_each_second())

    def changed(self) -> None:
        """Send soon."""
        self._changed.set()

    async def _send(self) -> None:
        await self._directory.heartbeat.remote(self._record())

    async def _send_each_second(self) -> None:
        while True:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._send(), 5 * HEARTBEAT_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S)


class SnapshotGateway:
    """Follows the directory for one gateway, and keeps its router."""

    def __init__(self, directory: Any, on_change: Callable[[ReplicaRecord, set[str]], None]) -> None:
        """`on_change` is called for each replica that has loaded adapters, with these."""
        self._directory = directory
        self._on_change = on_change
        self._router = Router(gateways=2)
        self._known: dict[str, ReplicaRecord] = {}
        self._updates = 0
        self._size = 0
        self.received_bytes = 0
        self.records: dict[str, ReplicaRecord] = {}

    async def follow(self) -> None:
        """Follow until cancelled."""
        version = 0
        while True:
            snapshot = await self._directory.watch.remote(version)
            version = snapshot.version
            if self._updates % SIZED_EVERY == 0:
                self._size = len(pickle.dumps(snapshot, pickle.HIGHEST_PROTOCOL))
            self._updates += 1
            self.received_bytes += self._size
            self._router.update(snapshot)
            previous_records, self.records = self.records, {record.id: record for record in snapshot.replicas}
            for record in snapshot.replicas:
                previous = previous_records.get(record.id)
                if previous is not None and previous.adapter_loads != record.adapter_loads:
                    self._on_change(record, set(record.adapters) - set(previous.adapters))
            await asyncio.sleep(MIN_UPDATE_INTERVAL_S)
