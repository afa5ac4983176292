"""Simulated replicas and gateways for bench.serving.directory, each group in a Ray actor, for the directory and its peer.

The id of each loaded adapter holds the moment of its load, and `running` the moment of the report: what a gateway knows tells how
old it is. Clocks are those of one machine.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import replace
from typing import Any

from bench.serving.directory_peer import SnapshotGateway, SnapshotReporter
from tandem.gateway.replicas.fleet import Fleet
from tandem.routing.changes import Update
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.router import Router
from tandem.serve.directory import Directory
from tandem.serve.directory_link import DirectoryClient, DirectoryWatcher, ReplicaReporter
from tandem.serve.directory_protocol import DirectoryAddress

STARTED_AT_ONCE = 50
SLOTS = 8
LOOK_S = 0.5
"""Seconds between two looks at the ages of loads."""


class ChangesDirectory:
    """The real directory in an actor of its own."""

    def __init__(self) -> None:
        self._directory = Directory(lambda deployment: None, host="127.0.0.1")

    async def address(self) -> DirectoryAddress:
        """Address of the listener."""
        return await self._directory.address()

    async def cpu_s(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()


class SimulatedReplica:
    """One replica's record; its adapters are replaced one by one, the oldest first."""

    def __init__(self, number: int, adapters: int) -> None:
        self.reporter: Any = None
        self._resident = deque(f"adapter-0-{number}-{n}@1" for n in range(adapters))
        self._loads = 0
        self._base = ReplicaRecord(
            id=f"r{number:06x}z",
            pool="base@1",
            deployment="engine-base",
            url=f"http://10.0.{number // 250}.{number % 250}:31234",
            token=f"{number:064x}",
            max_running=256,
            startup_s=(("process", 3.1), ("imports", 9.2), ("engine", 40.5)),
            tasks=("generate",),
        )

    def load(self) -> None:
        """Load one more adapter."""
        self._resident.popleft()
        self._resident.append(f"adapter-{time.monotonic_ns()}-{self._base.id}@1")
        self._loads += 1

    def record(self) -> ReplicaRecord:
        """The record now: its load differs in every report, and two of its slots."""
        resident = tuple(self._resident)
        return replace(
            self._base,
            running=time.monotonic_ns() // 1_000_000,
            waiting=random.randrange(4),
            kv_usage=round(random.random(), 4),
            adapters=resident,
            slots=(*resident[2 - SLOTS :], *random.sample(resident[: 2 - SLOTS], 2))
            if len(resident) > SLOTS
            else resident,
            adapter_loads=self._loads,
        )


class Replicas:
    """A fleet of replicas that load adapters, in one process."""

    def __init__(self, scheme: str, directory: Any, count: int, adapters: int) -> None:
        self._replicas = [SimulatedReplica(number, adapters) for number in range(count)]
        for replica in self._replicas:
            replica.reporter = (
                ReplicaReporter(DirectoryClient(directory.address.remote), replica.record)
                if scheme == "changes"
                else SnapshotReporter(directory, replica.record)
            )
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Have all known to the directory."""
        for first in range(0, len(self._replicas), STARTED_AT_ONCE):
            some = self._replicas[first : first + STARTED_AT_ONCE]
            await asyncio.gather(*(replica.reporter.start(30.0) for replica in some))

    async def load(self, per_s: float) -> None:
        """Begin to load adapters: `per_s` over the fleet, at random moments."""
        self._loading = asyncio.create_task(self._load(per_s))

    async def cpu_s(self) -> float:
        """CPU seconds of this process so far."""
        return time.process_time()

    async def _load(self, per_s: float) -> None:
        next_load_at = time.monotonic()
        while True:
            next_load_at += random.expovariate(per_s)
            await asyncio.sleep(max(0.0, next_load_at - time.monotonic()))
            replica = random.choice(self._replicas)
            replica.load()
            replica.reporter.changed()


class MeasuredFleet(Fleet):
    """A gateway's real fleet, which records its changes."""

    def __init__(self, group: Gateways, watcher: DirectoryWatcher) -> None:
        super().__init__(watcher, Router(gateways=2))
        self._group = group
        self.watcher = watcher

    def apply(self, update: Update) -> None:
        """Apply an update, then note the loads in it."""
        super().apply(update)
        if not isinstance(update, Snapshot):
            for change in update.changed:
                self._group.seen(set(change.adapters.added))

    @property
    def received_bytes(self) -> int:
        """Bytes of all updates so far."""
        return self.watcher.received_bytes

    @property
    def records(self) -> dict[str, ReplicaRecord]:
        """What it knows."""
        return self._view.records


class Gateways:
    """Several gateways in one process."""

    def __init__(self, scheme: str, directory: Any, count: int) -> None:
        self._count = count
        self._heard: dict[str, tuple[int, float]] = {}
        self._ages_s: list[float] = []
        self._since_ns = 0
        self._looking: asyncio.Task[None] | None = None
        self._gateways: list[Any] = [
            MeasuredFleet(self, DirectoryWatcher(DirectoryClient(directory.address.remote)))
            if scheme == "changes"
            else SnapshotGateway(directory, lambda record, loaded: self.seen(loaded))
            for _ in range(count)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, replicas: int) -> None:
        """Follow the directory; returns when every gateway knows all replicas."""
        for gateway in self._gateways:
            follow = gateway._follow if isinstance(gateway, Fleet) else gateway.follow
            self._tasks.append(asyncio.create_task(follow()))
        while any(len(gateway.records) < replicas for gateway in self._gateways):
            await asyncio.sleep(0.1)

    def seen(self, loaded: set[str]) -> None:
        """Record that a gateway has received loaded adapters."""
        now = time.monotonic_ns()
        for adapter in loaded:
            at = int(adapter.split("-")[1])
            if at >= self._since_ns > 0:
                count, _ = self._heard.get(adapter, (0, 0.0))
                self._heard[adapter] = (count + 1, (now - at) / 1e9)

    async def measure(self, seconds: float) -> dict[str, Any]:
        """Bytes for each gateway, delays until all of them knew of adapter loads, and the ages of their load data."""
        self._heard, self._ages_s, self._since_ns = {}, [], time.monotonic_ns()
        received_before, start_time, cpu = self._received(), time.monotonic(), time.process_time()
        while time.monotonic() - start_time < seconds:
            await asyncio.sleep(LOOK_S)
            now_ms = time.monotonic_ns() // 1_000_000
            for gateway in self._gateways:
                self._ages_s += [(now_ms - record.running) / 1000 for record in gateway.records.values()]
        wall = time.monotonic() - start_time
        # Those of the last moments may still be on their way.
        delays_ns = [delay_ns for count, delay_ns in self._heard.values() if count == self._count]
        return {
            "bytes_per_s": (self._received() - received_before) / wall / self._count,
            "loads": len(self._heard),
            "known_to_all": len(delays_ns),
            "staleness_s": delays_ns,
            "load_ages_s": random.sample(self._ages_s, min(len(self._ages_s), 20_000)),
            "cpu_each": (time.process_time() - cpu) / wall / self._count,
            "wall_s": wall,
        }

    def _received(self) -> int:
        return sum(gateway.received_bytes for gateway in self._gateways)
