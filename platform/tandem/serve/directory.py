"""Which replicas there are, and how many requests wait for each model. Holds nothing but what replicas and gateways repeat
every second, so a new directory is whole again after a few beats.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import HeartbeatReply, ReplicaRecord, Snapshot
from tandem.serve.listen import internal_port_on_node

HEARTBEAT_S = 1.0
"""How often a replica speaks, and a gateway hears of loads; changes travel at once."""
SILENT_AFTER_S = 10.0
"""How long a replica may be silent before it counts as lost."""
UNREACHABLE_S = 3 * HEARTBEAT_S
"""A directory that nobody has reached for so long was away itself."""
LOST_TTL_S = 60.0
"""How long a lost one is still listed, so that each gateway hears of it and ends what it had asked of it."""
WARM_UP_S = 3 * SILENT_AFTER_S
"""How long a new directory listens before it takes what it has not heard of for gone."""
DEMAND_TTL_S = 3 * HEARTBEAT_S
"""How long what a gateway said of its demand is good."""


@dataclass(slots=True)
class ReplicaTable:
    """The directory's state. Pure: callers pass the clock (seconds)."""

    version: int = field(default_factory=time.time_ns)
    """Starts from the time: a restarted directory must not repeat a version that a gateway has seen."""
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    heard_at: dict[str, float] = field(default_factory=dict)
    checked_at: float | None = None
    """When silence was last looked for."""

    def update(self, record: ReplicaRecord, now: float) -> bool:
        """Take a heartbeat; whether it changes more than loads."""
        known = self.records.get(record.id)
        self.records[record.id] = record
        self.heard_at[record.id] = now
        return self._changed(known is None or _without_load(known) != _without_load(record))

    def remove(self, replica_id: str) -> bool:
        """Drop a replica; whether it was there."""
        self.heard_at.pop(replica_id, None)
        return self._changed(self.records.pop(replica_id, None) is not None)

    def mark_silent(self, now: float) -> bool:
        """Mark those not heard for `SILENT_AFTER_S`, and drop them when they are forgotten; whether that changed anything.

        It is looked for every second as long as gateways can ask. Time in which nobody could reach the directory, not even they,
        is not the replicas' silence.
        """
        before, unreachable_s = self.version, 0.0 if self.checked_at is None else now - self.checked_at
        self.checked_at = now
        if unreachable_s > UNREACHABLE_S:
            self.heard_at = {replica_id: min(now, heard + unreachable_s) for replica_id, heard in self.heard_at.items()}
        for replica_id, heard in list(self.heard_at.items()):
            record = self.records[replica_id]
            if now - heard > LOST_TTL_S:
                self.remove(replica_id)
            elif now - heard > SILENT_AFTER_S and record.state != "silent":
                self.records[replica_id] = replace(record, state="silent")
                self._changed(True)
        return self.version != before

    def snapshot(self) -> Snapshot:
        """All replicas now."""
        return Snapshot(version=self.version, replicas=tuple(self.records.values()))

    def _changed(self, changed: bool) -> bool:
        self.version += changed
        return changed


@dataclass(slots=True)
class WaitingCounts:
    """Requests that wait at the gateways for a replica, by deployment. Pure: callers pass the clock (seconds)."""

    reports: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)
    """By gateway: when it last spoke, and what it said."""

    def update(self, gateway: str, waiting: Mapping[str, int], now: float) -> None:
        """Take what a gateway says."""
        self.reports = {key: said for key, said in self.reports.items() if now - said[0] <= DEMAND_TTL_S}
        self.reports[gateway] = (now, {key: count for key, count in waiting.items() if count > 0})

    def total(self, deployment: str, now: float) -> int:
        """How many wait for a deployment."""
        return sum(said.get(deployment, 0) for at, said in self.reports.values() if now - at <= DEMAND_TTL_S)


class Directory:
    """The ledger as a Serve deployment: replicas call `heartbeat`, gateways call `watch` and `demand`."""

    def __init__(self, wake: Callable[[str], Any] | None = None, registry: RegistryAddress | None = None) -> None:
        """`wake` asks for a replica of a deployment that has none; it is awaited, and called again only when it has ended.

        `registry` is followed for all replicas, which hear of its revision in answer to their heartbeats.
        """
        self._table = ReplicaTable()
        self._demand = WaitingCounts()
        self._began = time.monotonic()
        self._change = asyncio.Event()
        self._wake = wake or call_through_serve
        self._waking: dict[str, asyncio.Task[None]] = {}
        self._revision: int | None = None
        self._address = registry
        self._following: asyncio.Task[None] | None = None
        if wake is None:
            internal_port_on_node()

    async def heartbeat(self, record: ReplicaRecord) -> HeartbeatReply:
        """Take what a replica says of itself."""
        if self._address is not None and self._following is None:
            self._following = asyncio.create_task(self._follow(self._address))
        now = time.monotonic()
        self._publish_if(self._table.update(record, now))
        return HeartbeatReply(waiting=self._demand.total(record.deployment, now), registry_revision=self._revision)

    async def _follow(self, address: RegistryAddress) -> None:
        """Read the registry's revision every second; while the database does not answer, the last one stays."""
        registry = Registry.at(address)
        while True:
            # In a thread: a database that hangs must not keep heartbeats from being heard.
            with contextlib.suppress(Exception):
                self._revision = await asyncio.to_thread(registry.revision)
            await asyncio.sleep(HEARTBEAT_S)

    async def demand(self, gateway: str, waiting: dict[str, int]) -> None:
        """Take how many requests wait at a gateway, by deployment; a deployment without replicas is woken."""
        now = time.monotonic()
        self._demand.update(gateway, waiting, now)
        ready = {record.deployment for record in self._table.records.values() if record.state == "ready"}
        for deployment, count in waiting.items():
            if count > 0 and deployment not in ready and deployment not in self._waking:
                task = self._waking[deployment] = asyncio.create_task(self._wake_up(deployment))
                task.add_done_callback(functools.partial(self._wake_ended, deployment))
        for deployment, task in self._waking.items():
            # Whoever asked has given up: a replica that nobody waits for need not start.
            if not self._demand.total(deployment, now):
                task.cancel()

    def _wake_ended(self, deployment: str, task: asyncio.Task[None]) -> None:
        del self._waking[deployment]

    async def _wake_up(self, deployment: str) -> None:
        # A deployment that is going away does not answer; if it is still wanted, it is asked again.
        with contextlib.suppress(Exception):
            await self._wake(deployment)

    async def leave(self, replica_id: str) -> None:
        """Drop a replica that is about to end."""
        self._publish_if(self._table.remove(replica_id))

    async def watch(self, version: int) -> Snapshot:
        """The snapshot: at once if it is not of `version`, else at the next change, and after a beat for the loads."""
        self._publish_if(self._table.mark_silent(time.monotonic()))
        if version == self._table.version:
            change = self._change
            try:
                await asyncio.wait_for(change.wait(), HEARTBEAT_S)
            except TimeoutError:
                self._publish_if(self._table.mark_silent(time.monotonic()))
        whole = time.monotonic() - self._began >= WARM_UP_S
        return self._table.snapshot() if whole else replace(self._table.snapshot(), complete=False)

    def _publish_if(self, changed: bool) -> None:
        if changed:
            self._change.set()
            self._change = asyncio.Event()


async def call_through_serve(deployment: str) -> None:
    """Call a replica. Where there is none the call waits, and Serve starts one for it if autoscaling allows."""
    from ray import serve

    await _handle(deployment, serve.get_replica_context().app_name).woken.remote()


@functools.cache
def _handle(deployment: str, app: str) -> Any:
    # Each has a router of its own, with threads: one is enough.
    from ray import serve

    return serve.get_deployment_handle(deployment, app)


def _without_load(record: ReplicaRecord) -> ReplicaRecord:
    """The record without what changes with every request."""
    return replace(record, running=0, waiting=0, kv_usage=0.0, slots=())
