"""Directory of replicas and of waiting requests: soft state that replicas and gateways repeat every second.

A restarted directory is complete again after a few heartbeats.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.limits import LimitLedger, Verdict
from tandem.limits.ledger import Operation
from tandem.registry import Registry, RegistryAddress
from tandem.routing.records import HeartbeatReply, ReplicaRecord, Snapshot
from tandem.serve.listen import internal_port_on_node

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats of a replica, and between two snapshots for a gateway; changes are sent at once."""
SILENT_AFTER_S = 10.0
"""Seconds without heartbeats after which a replica counts as lost."""
UNREACHABLE_S = 3 * HEARTBEAT_S
"""A directory that no gateway has called for so many seconds was itself unreachable."""
LOST_TTL_S = 60.0
"""Seconds for which a lost replica stays listed, so that every gateway ends its requests there."""
WARM_UP_S = 3 * SILENT_AFTER_S
"""Seconds after its start in which a directory does not know all replicas yet."""
DEMAND_TTL_S = 3 * HEARTBEAT_S
"""Seconds after which a gateway's numbers of waiting requests expire."""


@dataclass(slots=True)
class ReplicaTable:
    """Replicas and the times of their heartbeats. Pure: callers pass the clock (seconds)."""

    version: int = field(default_factory=time.time_ns)
    """Starts from the clock, so that a restarted directory repeats no version."""
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    heard_at: dict[str, float] = field(default_factory=dict)
    checked_at: float | None = None
    """Time of the last `mark_silent`."""

    def update(self, record: ReplicaRecord, now: float) -> bool:
        """Apply a heartbeat; returns whether more than loads changed."""
        known = self.records.get(record.id)
        self.records[record.id] = record
        self.heard_at[record.id] = now
        return self._changed(known is None or _without_load(known) != _without_load(record))

    def remove(self, replica_id: str) -> bool:
        """Remove a replica; returns whether it was known."""
        self.heard_at.pop(replica_id, None)
        return self._changed(self.records.pop(replica_id, None) is not None)

    def mark_silent(self, now: float) -> bool:
        """Mark those not heard for `SILENT_AFTER_S`, and remove them after `LOST_TTL_S`; returns whether anything changed.

        Gateways call this every second. Time in which none could reach the directory does not count as the replicas' silence.
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
    """Waiting requests by gateway and deployment. Pure: callers pass the clock (seconds)."""

    reports: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)
    """By gateway: time and numbers of its last report."""

    def update(self, gateway: str, waiting: Mapping[str, int], now: float) -> None:
        """Apply a gateway's report."""
        self.reports = {key: report for key, report in self.reports.items() if now - report[0] <= DEMAND_TTL_S}
        self.reports[gateway] = (now, {key: count for key, count in waiting.items() if count > 0})

    def total(self, deployment: str, now: float) -> int:
        """Waiting requests for a deployment."""
        return sum(report.get(deployment, 0) for at, report in self.reports.values() if now - at <= DEMAND_TTL_S)


class Directory:
    """The directory's Serve deployment: replicas call `heartbeat` and `leave`, gateways call `watch` and `demand`."""

    def __init__(self, wake: Callable[[str], Any] | None = None, registry: RegistryAddress | None = None) -> None:
        """`wake` starts the first replica of a deployment; it is awaited, and called again only when it has ended.

        `registry`: its revision is read for all replicas, which get it in the reply to their heartbeats.
        """
        self._table = ReplicaTable()
        self._limits = LimitLedger()
        self._limits_id = uuid.uuid4().hex
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
        """Apply a replica's heartbeat."""
        if self._address is not None and self._following is None:
            self._following = asyncio.create_task(self._follow(self._address))
        now = time.monotonic()
        self._publish_if(self._table.update(record, now))
        return HeartbeatReply(waiting=self._demand.total(record.deployment, now), registry_revision=self._revision)

    async def _follow(self, address: RegistryAddress) -> None:
        """Read the registry's revision every second; it stays while the database does not answer."""
        registry = Registry.at(address)
        while True:
            # In a thread: a database that hangs must not block heartbeats.
            with contextlib.suppress(Exception):
                self._revision = await asyncio.to_thread(registry.revision)
            await asyncio.sleep(HEARTBEAT_S)

    async def demand(self, gateway: str, waiting: dict[str, int]) -> None:
        """Apply a gateway's numbers of waiting requests by deployment; starts a replica of deployments that have none."""
        now = time.monotonic()
        self._demand.update(gateway, waiting, now)
        ready = {record.deployment for record in self._table.records.values() if record.state == "ready"}
        for deployment, count in waiting.items():
            if count > 0 and deployment not in ready and deployment not in self._waking:
                task = self._waking[deployment] = asyncio.create_task(self._wake_up(deployment))
                task.add_done_callback(functools.partial(self._wake_ended, deployment))
        for deployment, task in self._waking.items():
            # No request waits any more, so no replica need start.
            if not self._demand.total(deployment, now):
                task.cancel()

    async def apply_limits(
        self, gateway: str, operations: tuple[Operation, ...], totals: dict[str, int] | None
    ) -> tuple[str, list[Verdict]]:
        """Apply a gateway's operations to the ledger of limits, and today's tokens if they are given; returns the ledger's id and
        the verdicts.
        """
        now = time.time()
        if totals is not None:
            self._limits.observe_day(totals, now)
        return self._limits_id, self._limits.apply(gateway, operations, now)

    def _wake_ended(self, deployment: str, task: asyncio.Task[None]) -> None:
        del self._waking[deployment]

    async def _wake_up(self, deployment: str) -> None:
        # A deployment that is being deleted does not answer; while requests wait, it is called again.
        with contextlib.suppress(Exception):
            await self._wake(deployment)

    async def leave(self, replica_id: str) -> None:
        """Remove a replica that is about to end."""
        self._publish_if(self._table.remove(replica_id))

    async def watch(self, version: int) -> Snapshot:
        """The snapshot: at once if its version is not `version`, else at the next change or after `HEARTBEAT_S`."""
        self._publish_if(self._table.mark_silent(time.monotonic()))
        if version == self._table.version:
            change = self._change
            try:
                await asyncio.wait_for(change.wait(), HEARTBEAT_S)
            except TimeoutError:
                self._publish_if(self._table.mark_silent(time.monotonic()))
        complete = time.monotonic() - self._began >= WARM_UP_S
        return self._table.snapshot() if complete else replace(self._table.snapshot(), complete=False)

    def _publish_if(self, changed: bool) -> None:
        if changed:
            self._change.set()
            self._change = asyncio.Event()


async def call_through_serve(deployment: str) -> None:
    """Call a deployment's replica. Without one the call waits, and Serve starts one if autoscaling allows."""
    from ray import serve

    await _handle(deployment, serve.get_replica_context().app_name).woken.remote()


@functools.cache
def _handle(deployment: str, app: str) -> Any:
    # Each handle has a router with threads of its own: one for each deployment is enough.
    from ray import serve

    return serve.get_deployment_handle(deployment, app)


def _without_load(record: ReplicaRecord) -> ReplicaRecord:
    """The record without what changes with every request."""
    return replace(record, running=0, waiting=0, kv_usage=0.0, slots=())
