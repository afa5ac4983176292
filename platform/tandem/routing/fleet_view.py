"""A gateway's copy of the directory: applies snapshots and changes, and knows what differs since the previous one. Pure.

Beside what the directory tells it holds two kinds of the gateway's own knowledge: replicas of an earlier directory that a new one
has not heard from yet, and silent replicas that have answered a probe.
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
    gone: tuple[ReplicaRecord, ...] = ()
    """Replicas of an earlier directory that the present one, now complete, has never heard from."""


@dataclass(slots=True)
class FleetView:
    """Replicas by id."""

    epoch: int = 0
    version: int = 0
    complete: bool = True
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    """Every known replica in the state in which the gateway treats it."""
    told: dict[str, ReplicaRecord] = field(default_factory=dict)
    """Replicas as the directory describes them."""
    unheard: set[str] = field(default_factory=set)
    """Replicas of an earlier directory that the present, incomplete one has not heard from."""
    lost: set[str] = field(default_factory=set)
    """Replicas that the directory calls lost."""
    _confirmed: set[str] = field(default_factory=set)
    """Lost replicas that have answered a probe."""
    _unsure: set[str] = field(default_factory=set)
    """Replicas of which a probe's result came since the last update."""

    def confirm(self, replica_id: str, *, ready: bool) -> None:
        """Set whether a silent replica has answered a probe; takes effect with the next update."""
        (self._confirmed.add if ready else self._confirmed.discard)(replica_id)
        self._unsure.add(replica_id)

    def apply(self, update: Update) -> ViewChange:
        """Apply an update of the directory. VersionMismatchError, and no effect, if it needs another version than this one."""
        touched = self._apply_snapshot(update) if isinstance(update, Snapshot) else self._apply_changes(update)
        self.epoch, self.version, self.complete = update.epoch, update.version, update.complete
        self._confirmed &= self.lost
        touched |= self._unsure
        self._unsure = set()
        gone: tuple[ReplicaRecord, ...] = ()
        if self.complete and self.unheard:
            # A restarted directory has become complete without a heartbeat from these.
            gone = tuple(self.records[each] for each in self.unheard)
            touched |= self.unheard
            self.unheard = set()
        return self._refresh(touched, gone)

    def _apply_snapshot(self, snapshot: Snapshot) -> set[str]:
        known = self.told
        self.told = {record.id: normalised(record) for record in snapshot.replicas}
        missing = (known.keys() | self.unheard) - self.told.keys()
        # An incomplete directory of the same process has not forgotten anything: what it leaves out has left it.
        restarted = snapshot.epoch != self.epoch or snapshot.epoch == 0
        if not snapshot.complete and restarted:
            self.unheard |= missing
        self.unheard -= self.told.keys()
        self.lost = {key for key, record in self.told.items() if record.lost}
        return {*missing, *self.told}

    def _apply_changes(self, changes: Changes) -> set[str]:
        if (changes.epoch, changes.since) != (self.epoch, self.version):
            raise VersionMismatchError(
                f"Changes of the directory {changes.epoch} since version {changes.since} do not apply to version "
                f"{self.version} of {self.epoch}. A snapshot is needed."
            )
        told: dict[str, ReplicaRecord | None] = dict.fromkeys(changes.removed)
        for change in changes.changed:
            record = change.record
            if record is None:
                known = self.told.get(change.id)
                if known is None:
                    raise VersionMismatchError(f"The directory changed {change.id}, which is not known here.")
                record = applied(known, change)
            told[change.id] = record
        for key, record in told.items():
            if record is None:
                self.told.pop(key, None)
            else:
                self.told[key] = record
                self.unheard.discard(key)
            if record is not None and record.lost:
                self.lost.add(key)
            else:
                self.lost.discard(key)
        return set(told)

    def _refresh(self, touched: Iterable[str], gone: tuple[ReplicaRecord, ...]) -> ViewChange:
        changed, removed = [], []
        for key in touched:
            before, after = self.records.get(key), self._treated(key)
            if after is None:
                if before is not None:
                    removed.append(self.records.pop(key))
            elif before is None or after != before:
                self.records[key] = after
                changed.append(after)
        return ViewChange(changed=tuple(changed), removed=tuple(removed), gone=gone)

    def _treated(self, key: str) -> ReplicaRecord | None:
        """A replica in the state in which the gateway treats it; None: there is none any more."""
        record = self.told.get(key)
        if record is None:
            return self.records.get(key) if key in self.unheard else None
        return replace(record, state="ready") if record.state == "silent" and key in self._confirmed else record
