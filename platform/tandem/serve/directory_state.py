"""State of the directory: replicas, the times of their heartbeats, and a log of changes that brings gateways up to date. Pure.

Callers pass the clock, in seconds.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tandem.errors import TandemError
from tandem.routing.changes import Changes, ReplicaChange, Update, applied, difference, merged, normalised
from tandem.routing.records import ReplicaRecord, Snapshot

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
LOGGED_CHANGES = 16_384
"""Changes that are kept for gateways: ten seconds of a thousand replicas. A gateway further behind gets a snapshot."""


class UnknownReplicaError(TandemError):
    """A report of changes came from a replica whose record is not known: it has to send the whole record."""


@dataclass(slots=True)
class DirectoryState:
    """Replicas, their heartbeats, and the log of changes."""

    epoch: int = field(default_factory=time.time_ns)
    """Identifies this process's directory. Taken from the clock; the protocol needs no order of epochs."""
    version: int = 1
    """Number of changes so far, and one; 0 is the version of a gateway that knows nothing."""
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    heard_at: dict[str, float] = field(default_factory=dict)
    checked_at: float | None = None
    """Time of the last `mark_silent`."""
    _told: dict[str, ReplicaRecord] = field(default_factory=dict)
    """Records as the replicas reported them: a silent one returns in the state that it was in."""
    _log: deque[tuple[int, ReplicaChange | str]] = field(default_factory=lambda: deque(maxlen=LOGGED_CHANGES))
    """Version after each of the last changes, with the change or the id of a removed replica."""

    def report(self, change: ReplicaChange, now: float) -> bool:
        """Apply a replica's report; returns whether anything changed. UnknownReplicaError where the whole record is needed."""
        known = self._told.get(change.id)
        if change.record is not None:
            record = normalised(change.record)
            change = ReplicaChange(id=record.id, record=record) if known is None else difference(known, record)
        elif known is None:
            raise UnknownReplicaError(
                f"The directory does not know the replica {change.id}. It sends its whole record."
            )
        else:
            record = known if change.empty else applied(known, change)
        self.heard_at[change.id] = now
        shown = self.records.get(change.id)
        self._told[change.id] = record
        if shown is not None and shown.state == "silent" != record.state:
            change = ReplicaChange(id=record.id, record=record)
        if change.empty:
            return False
        self.records[record.id] = record
        self._append(change)
        return True

    def remove(self, replica_id: str) -> bool:
        """Remove a replica; returns whether it was known."""
        self.heard_at.pop(replica_id, None)
        self._told.pop(replica_id, None)
        if self.records.pop(replica_id, None) is None:
            return False
        self._append(replica_id)
        return True

    def mark_silent(self, now: float) -> bool:
        """Mark those not heard for `SILENT_AFTER_S`, and remove them after `LOST_TTL_S`; returns whether anything changed.

        Called whenever a gateway is heard from. Time in which none could reach the directory does not count as the replicas'
        silence.
        """
        before, unreachable_s = self.version, 0.0 if self.checked_at is None else now - self.checked_at
        self.checked_at = now
        if unreachable_s > UNREACHABLE_S:
            self.heard_at = {replica_id: min(now, heard + unreachable_s) for replica_id, heard in self.heard_at.items()}
        limit = now - SILENT_AFTER_S
        for replica_id in [replica_id for replica_id, heard in self.heard_at.items() if heard < limit]:
            record = self.records[replica_id]
            if now - self.heard_at[replica_id] > LOST_TTL_S:
                self.remove(replica_id)
            elif record.state != "silent":
                silent = self.records[replica_id] = replace(record, state="silent")
                self._append(ReplicaChange(id=replica_id, record=silent))
        return self.version != before

    def snapshot(self, *, complete: bool = True) -> Snapshot:
        """All replicas now."""
        replicas = tuple(self.records.values())
        return Snapshot(version=self.version, epoch=self.epoch, complete=complete, replicas=replicas)

    def changes_since(self, epoch: int, version: int, *, complete: bool = True) -> Update:
        """What a gateway at a version is to be sent: the changes since, or a snapshot where they are not known any more."""
        oldest = self._log[0][0] - 1 if self._log else self.version
        if epoch != self.epoch or not oldest <= version <= self.version:
            return self.snapshot(complete=complete)
        later = []
        for at, entry in reversed(self._log):
            if at <= version:
                break
            later.append(entry)
        changed: dict[str, ReplicaChange] = {}
        removed: dict[str, None] = {}
        for entry in reversed(later):
            if isinstance(entry, str):
                changed.pop(entry, None)
                removed[entry] = None
            else:
                first = changed.get(entry.id)
                changed[entry.id] = entry if first is None else merged(first, entry)
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
        return sum(report.get(deployment, 0) for at, report in self.reports.values() if now - at <= DEMAND_TTL_S)
