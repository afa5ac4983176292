"""State of the directory: replicas, the times of their heartbeats, and a log of changes that brings gateways up to date. Pure.

Callers pass the clock, in seconds.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tandem.errors import TandemError
from tandem.routing.changes import Changes, Load, ReplicaChange, Update, difference, merged, normalised
from tandem.routing.records import ReplicaRecord, Snapshot, State

HEARTBEAT_S = 1.0
"""Seconds between two heartbeats of a replica, and between two messages to a gateway to which nothing else is sent."""
SILENT_AFTER_S = 10.0
"""Seconds without heartbeats after which a replica counts as lost."""
UNREACHABLE_S = 3 * HEARTBEAT_S
"""A directory that no gateway has called for so many seconds was itself unreachable."""
LOST_TTL_S = 60.0
"""Seconds for which a lost replica stays listed, so that every gateway ends its requests there."""
DEMAND_TTL_S = 3 * HEARTBEAT_S
"""Seconds after which a gateway's numbers of waiting requests expire."""
CHECK_INTERVAL_S = HEARTBEAT_S / 2
"""Shortest time between two checks for silent replicas, in seconds."""
MAX_LOGGED_CHANGES = 16_384
"""Changes that are kept for gateways: ten seconds of a thousand replicas. A gateway further behind gets a snapshot."""


class UnknownReplicaError(TandemError):
    """A report of changes came from a replica whose record is not known: it has to send the whole record."""


@dataclass(slots=True)
class _Replica:
    """One replica. Fields that change with every request are apart from its record, whose replacement would take longest."""

    base_record: ReplicaRecord
    """The last whole record that it sent."""
    load: Load
    adapters: set[str]
    slots: set[str]
    adapter_loads: int
    heard_at: float
    silent: bool = False

    @classmethod
    def of(cls, record: ReplicaRecord, now: float) -> _Replica:
        load = Load(record.running, record.waiting, record.kv_usage)
        return cls(record, load, set(record.adapters), set(record.slots), record.adapter_loads, now)

    def apply(self, change: ReplicaChange) -> None:
        if change.load is not None:
            self.load = change.load
        if change.adapters:
            self.adapters.difference_update(change.adapters.removed)
            self.adapters.update(change.adapters.added)
        if change.slots:
            self.slots.difference_update(change.slots.removed)
            self.slots.update(change.slots.added)
        if change.adapter_loads is not None:
            self.adapter_loads = change.adapter_loads

    def reported_record(self) -> ReplicaRecord:
        """Its record with all changes that it has reported."""
        running, waiting, kv_usage = self.load
        return replace(
            self.base_record,
            running=running,
            waiting=waiting,
            kv_usage=kv_usage,
            adapters=tuple(sorted(self.adapters)),
            slots=tuple(sorted(self.slots)),
            adapter_loads=self.adapter_loads,
        )

    def record(self) -> ReplicaRecord:
        """Its record, for gateways."""
        return replace(self.reported_record(), state="silent") if self.silent else self.reported_record()

    @property
    def state(self) -> State:
        return "silent" if self.silent else self.base_record.state


@dataclass(slots=True)
class DirectoryState:
    """Replicas, their heartbeats, and the log of changes."""

    epoch: int = field(default_factory=time.time_ns)
    """Identifies this process's directory. Taken from the clock; the protocol needs no order of epochs."""
    version: int = 1
    """Number of changes so far, and one; 0 is the version of a gateway that knows nothing."""
    contact_at: float | None = None
    """Time of the last `mark_silent`."""
    _checked_at: float = -math.inf
    _replicas: dict[str, _Replica] = field(default_factory=dict)
    _log: deque[tuple[int, ReplicaChange | str]] = field(default_factory=lambda: deque(maxlen=MAX_LOGGED_CHANGES))
    """Version after each of the last changes, with the change or the id of a removed replica."""

    @property
    def records(self) -> dict[str, ReplicaRecord]:
        """Every replica's record by id; made anew at each call."""
        return {key: replica.record() for key, replica in self._replicas.items()}

    def pool_and_deployment(self, replica_id: str) -> tuple[str, str] | None:
        """Pool and deployment of a replica; None: it is not known."""
        replica = self._replicas.get(replica_id)
        return None if replica is None else (replica.base_record.pool, replica.base_record.deployment)

    def pools(self) -> set[str]:
        """Pools of all replicas."""
        return {replica.base_record.pool for replica in self._replicas.values()}

    def ready_deployments(self) -> set[str]:
        """Deployments with a ready replica."""
        return {replica.base_record.deployment for replica in self._replicas.values() if replica.state == "ready"}

    def report(self, change: ReplicaChange, now: float) -> bool:
        """Apply a replica's report; returns whether anything changed. UnknownReplicaError where the whole record is needed."""
        replica = self._replicas.get(change.id)
        if replica is None:
            if change.record is None:
                raise UnknownReplicaError(
                    f"The directory does not know the replica {change.id}. It sends its whole record."
                )
            record = normalised(change.record)
            self._replicas[record.id] = _Replica.of(record, now)
            self._append(ReplicaChange(id=record.id, record=record))
            return True
        if change.record is not None:
            record = normalised(change.record)
            change = difference(replica.reported_record(), record)
            if change.record is not None:
                silent, replica = replica.silent, _Replica.of(record, now)
                replica.silent = silent
                self._replicas[record.id] = replica
        replica.heard_at = now
        if change.record is None and not change.empty:
            replica.apply(change)
        if replica.silent:
            replica.silent = False
            change = ReplicaChange(id=change.id, record=replica.reported_record())
        if change.empty:
            return False
        self._append(change)
        return True

    def remove(self, replica_id: str) -> bool:
        """Remove a replica; returns whether it was known."""
        if self._replicas.pop(replica_id, None) is None:
            return False
        self._append(replica_id)
        return True

    def mark_silent(self, now: float) -> bool:
        """Mark replicas without heartbeats for `SILENT_AFTER_S`, remove them after `LOST_TTL_S`; returns whether any changed.

        Called whenever a gateway is heard from. Time in which none could reach the directory does not count as the replicas'
        silence.
        """
        unreachable_s = 0.0 if self.contact_at is None else now - self.contact_at
        self.contact_at = now
        if unreachable_s > UNREACHABLE_S:
            for replica in self._replicas.values():
                replica.heard_at = min(now, replica.heard_at + unreachable_s)
        if now - self._checked_at < CHECK_INTERVAL_S:
            return False
        self._checked_at, version_before, silent_before = now, self.version, now - SILENT_AFTER_S
        for replica_id in [key for key, replica in self._replicas.items() if replica.heard_at < silent_before]:
            replica = self._replicas[replica_id]
            if now - replica.heard_at > LOST_TTL_S:
                self.remove(replica_id)
            elif not replica.silent:
                replica.silent = True
                self._append(ReplicaChange(id=replica_id, record=replica.record()))
        return self.version != version_before

    def snapshot(self, *, complete: bool = True) -> Snapshot:
        """All replicas now."""
        replicas = tuple(self.records.values())
        return Snapshot(version=self.version, epoch=self.epoch, complete=complete, replicas=replicas)

    def changes_since(self, epoch: int, version: int, *, complete: bool = True) -> Update:
        """The update for a gateway at a version: the changes since, or a snapshot if the log does not reach back that far."""
        oldest = self._log[0][0] - 1 if self._log else self.version
        if epoch != self.epoch or not oldest <= version <= self.version:
            return self.snapshot(complete=complete)
        entries = []
        for version_after, entry in reversed(self._log):
            if version_after <= version:
                break
            entries.append(entry)
        changed: dict[str, ReplicaChange] = {}
        removed: dict[str, None] = {}
        for entry in reversed(entries):
            if isinstance(entry, str):
                changed.pop(entry, None)
                removed[entry] = None
            else:
                earlier = changed.get(entry.id)
                changed[entry.id] = entry if earlier is None else merged(earlier, entry)
        return Changes(
            epoch=epoch,
            since=version,
            version=self.version,
            complete=complete,
            changed=tuple(changed.values()),
            removed=tuple(removed),
        )

    def _append(self, entry: ReplicaChange | str) -> None:
        self.version += 1
        self._log.append((self.version, entry))


@dataclass(slots=True)
class WaitingCounts:
    """Waiting requests by gateway and deployment."""

    reports: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)
    """By gateway: time and numbers of its last report."""

    def update(self, gateway: str, waiting: Mapping[str, int], now: float) -> None:
        """Apply a gateway's report."""
        self.reports = {key: report for key, report in self.reports.items() if now - report[0] <= DEMAND_TTL_S}
        self.reports[gateway] = (now, {key: count for key, count in waiting.items() if count > 0})

    def total(self, deployment: str, now: float) -> int:
        """Waiting requests for a deployment."""
        return sum(
            report.get(deployment, 0)
            for reported_at, report in self.reports.values()
            if now - reported_at <= DEMAND_TTL_S
        )
