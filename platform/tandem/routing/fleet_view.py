"""A gateway's copy of the directory: applies snapshots and changes, and returns the replicas that differ. Pure.

Beside the directory's records it holds replicas of an earlier directory that a new one has not heard from yet, and the silent
replicas that have answered this gateway's probe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tandem.errors import TandemError
from tandem.routing.changes import Changes, Update, applied, normalised
from tandem.routing.records import ReplicaRecord, Snapshot


class VersionMismatchError(TandemError):
    """Changes do not apply to the version that is here: a snapshot is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewChange:
    """Difference between two states of a view."""

    changed: tuple[ReplicaRecord, ...] = ()
    """Replicas that are new or differ."""
    removed: tuple[ReplicaRecord, ...] = ()
    never_reported: tuple[ReplicaRecord, ...] = ()
    """Replicas of an earlier directory that the present one, now complete, has never heard from."""


@dataclass(slots=True)
class FleetView:
    """Replicas by id."""

    epoch: int = 0
    version: int = 0
    complete: bool = True
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    """Every known replica in the state in which the gateway treats it."""
    reported: dict[str, ReplicaRecord] = field(default_factory=dict)
    """Replicas as the directory describes them."""
    carried_over: set[str] = field(default_factory=set)
    """Replicas of an earlier directory that the present, incomplete one has not heard from."""
    lost: set[str] = field(default_factory=set)
    """Replicas that the directory calls lost."""
    _confirmed: set[str] = field(default_factory=set)
    """Lost replicas that have answered a probe."""
    _probed: set[str] = field(default_factory=set)
    """Replicas that were probed since the last update."""

    def confirm(self, replica_id: str, *, ready: bool) -> None:
        """Set whether a silent replica has answered a probe; takes effect with the next update."""
        (self._confirmed.add if ready else self._confirmed.discard)(replica_id)
        self._probed.add(replica_id)

    def apply(self, update: Update) -> ViewChange:
        """Apply an update of the directory. VersionMismatchError, and no effect, if it needs another version than this one."""
        touched_ids = self._apply_snapshot(update) if isinstance(update, Snapshot) else self._apply_changes(update)
        self.epoch, self.version, self.complete = update.epoch, update.version, update.complete
        self._confirmed &= self.lost
        touched_ids |= self._probed
        self._probed = set()
        never_reported: tuple[ReplicaRecord, ...] = ()
        if self.complete and self.carried_over:
            # A restarted directory has become complete without a heartbeat from these.
            never_reported = tuple(self.records[replica_id] for replica_id in self.carried_over)
            touched_ids |= self.carried_over
            self.carried_over = set()
        return self._refresh(touched_ids, never_reported)

    def _apply_snapshot(self, snapshot: Snapshot) -> set[str]:
        previous = self.reported
        self.reported = {record.id: normalised(record) for record in snapshot.replicas}
        missing = (previous.keys() | self.carried_over) - self.reported.keys()
        # A snapshot of the same process that lacks a replica means that the replica has left, complete or not.
        restarted = snapshot.epoch != self.epoch or snapshot.epoch == 0
        if not snapshot.complete and restarted:
            self.carried_over |= missing
        self.carried_over -= self.reported.keys()
        self.lost = {key for key, record in self.reported.items() if record.lost}
        return {*missing, *self.reported}

    def _apply_changes(self, changes: Changes) -> set[str]:
        if (changes.epoch, changes.since) != (self.epoch, self.version):
            raise VersionMismatchError(
                f"Changes of the directory {changes.epoch} since version {changes.since} do not apply to version "
                f"{self.version} of {self.epoch}. A snapshot is needed."
            )
        reported: dict[str, ReplicaRecord | None] = dict.fromkeys(changes.removed)
        for change in changes.changed:
            record = change.record
            if record is None:
                previous = self.reported.get(change.id)
                if previous is None:
                    raise VersionMismatchError(f"The directory changed {change.id}, which is not known here.")
                record = applied(previous, change)
            reported[change.id] = record
        for key, record in reported.items():
            if record is None:
                self.reported.pop(key, None)
            else:
                self.reported[key] = record
                self.carried_over.discard(key)
            if record is not None and record.lost:
                self.lost.add(key)
            else:
                self.lost.discard(key)
        return set(reported)

    def _refresh(self, touched_ids: Iterable[str], never_reported: tuple[ReplicaRecord, ...]) -> ViewChange:
        changed, removed = [], []
        for key in touched_ids:
            old_record, new_record = self.records.get(key), self._effective_record(key)
            if new_record is None:
                if old_record is not None:
                    removed.append(self.records.pop(key))
            elif old_record is None or new_record != old_record:
                self.records[key] = new_record
                changed.append(new_record)
        return ViewChange(changed=tuple(changed), removed=tuple(removed), never_reported=never_reported)

    def _effective_record(self, key: str) -> ReplicaRecord | None:
        """A replica in the state in which the gateway treats it; None: there is none any more."""
        record = self.reported.get(key)
        if record is None:
            return self.records.get(key) if key in self.carried_over else None
        return replace(record, state="ready") if record.state == "silent" and key in self._confirmed else record
