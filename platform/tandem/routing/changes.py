"""Changes of replica records, of one report or of several merged ones. Pure.

A change is exact about load and residency, and holds the whole record for anything else, which changes rarely. Replicas report
changes to the directory, and the directory passes them on to gateways, merged over the time between two pushes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from tandem.routing.records import ReplicaRecord, Snapshot


class Load(NamedTuple):
    """Load of a replica."""

    running: int
    waiting: int
    kv_usage: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SetChange:
    """Members that were added to a set and removed from it."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)

    def apply(self, members: Iterable[str]) -> tuple[str, ...]:
        """The members after the change, sorted."""
        return tuple(sorted((set(members) - set(self.removed)) | set(self.added)))

    def then(self, later: SetChange) -> SetChange:
        """This change followed by a later one."""
        added = (set(self.added) - set(later.removed)) | set(later.added)
        removed = (set(self.removed) - set(later.added)) | set(later.removed)
        return SetChange(added=tuple(sorted(added)), removed=tuple(sorted(removed)))


NO_CHANGE = SetChange()


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaChange:
    """Difference of one replica's record to its previous report; empty: a heartbeat."""

    id: str
    record: ReplicaRecord | None = None
    """The whole record: the replica is new, or more than load and residency changed. The other fields are unset then."""
    load: Load | None = None
    adapters: SetChange = NO_CHANGE
    slots: SetChange = NO_CHANGE
    adapter_loads: int | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing changed."""
        return self.record is None and self.load is None and self.adapter_loads is None and not self.moves

    @property
    def moves(self) -> bool:
        """Whether adapters were loaded, evicted, or moved into slots or out of them."""
        return bool(self.adapters or self.slots)


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Differences of a directory's replicas to an earlier version."""

    epoch: int
    since: int
    """The version that they apply to."""
    version: int
    complete: bool = True
    """As `Snapshot.complete`."""
    changed: tuple[ReplicaChange, ...] = ()
    removed: tuple[str, ...] = ()
    """Ids of replicas that are gone. A replica that is in `changed` too has come back since."""


Update = Snapshot | Changes
"""Message of a directory to a gateway."""


def normalised(record: ReplicaRecord) -> ReplicaRecord:
    """The record with its sets in one order, so that equal states are equal records."""
    adapters, slots = tuple(sorted(record.adapters)), tuple(sorted(record.slots))
    if adapters == record.adapters and slots == record.slots:
        return record
    return replace(record, adapters=adapters, slots=slots)


def difference(before: ReplicaRecord, after: ReplicaRecord) -> ReplicaChange:
    """The change from one normalised record of a replica to another."""
    if _description(before) != _description(after):
        return ReplicaChange(id=after.id, record=after)
    load, previous_load = _load(after), _load(before)
    return ReplicaChange(
        id=after.id,
        load=None if load == previous_load else load,
        adapters=_set_change(before.adapters, after.adapters),
        slots=_set_change(before.slots, after.slots),
        adapter_loads=None if before.adapter_loads == after.adapter_loads else after.adapter_loads,
    )


def applied(record: ReplicaRecord, change: ReplicaChange) -> ReplicaRecord:
    """The normalised record after a change."""
    if change.record is not None:
        return change.record
    running, waiting, kv_usage = change.load or _load(record)
    return replace(
        record,
        running=running,
        waiting=waiting,
        kv_usage=kv_usage,
        adapters=change.adapters.apply(record.adapters) if change.adapters else record.adapters,
        slots=change.slots.apply(record.slots) if change.slots else record.slots,
        adapter_loads=record.adapter_loads if change.adapter_loads is None else change.adapter_loads,
    )


def merged(earlier: ReplicaChange, later: ReplicaChange) -> ReplicaChange:
    """Two changes of one replica, one after the other, as one."""
    if later.record is not None:
        return later
    if earlier.record is not None:
        return ReplicaChange(id=earlier.id, record=applied(earlier.record, later))
    return ReplicaChange(
        id=earlier.id,
        load=later.load or earlier.load,
        adapters=earlier.adapters.then(later.adapters) if later.adapters else earlier.adapters,
        slots=earlier.slots.then(later.slots) if later.slots else earlier.slots,
        adapter_loads=earlier.adapter_loads if later.adapter_loads is None else later.adapter_loads,
    )


def _load(record: ReplicaRecord) -> Load:
    return Load(record.running, record.waiting, record.kv_usage)


def _description(record: ReplicaRecord) -> tuple[object, ...]:
    """The fields whose change is reported as a whole record."""
    return (
        record.id, record.pool, record.deployment, record.url, record.token, record.state, record.max_running,
        record.pin_problems, record.started_at, record.startup_s, record.tasks,
    )  # fmt: skip


def _set_change(before: tuple[str, ...], after: tuple[str, ...]) -> SetChange:
    if before == after:
        return NO_CHANGE
    return SetChange(added=tuple(sorted(set(after) - set(before))), removed=tuple(sorted(set(before) - set(after))))
