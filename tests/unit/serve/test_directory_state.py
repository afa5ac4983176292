"""State of the directory, and the copies that gateways make of it from changes."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.routing.changes import Changes, ReplicaChange, applied, difference, merged, normalised
from tandem.routing.fleet_view import FleetView, VersionMismatchError
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.serve.directory_state import (
    DEMAND_TTL_S,
    LOST_TTL_S,
    SILENT_AFTER_S,
    DirectoryState,
    UnknownReplicaError,
    WaitingCounts,
)

A = ReplicaRecord(id="a", pool="base@1", url="http://a", token="t")
ADAPTERS = st.lists(st.sampled_from(["red@1", "blue@1", "green@2", "grey@1"]), unique=True).map(tuple)
RECORDS = st.builds(
    ReplicaRecord,
    id=st.sampled_from("abc"),
    pool=st.just("base@1"),
    url=st.just("http://a"),
    token=st.just("t"),
    state=st.sampled_from(["ready", "draining", "dead", "stuck"]),
    running=st.integers(0, 3),
    kv_usage=st.sampled_from([0.0, 0.5]),
    adapters=ADAPTERS,
    slots=ADAPTERS,
    adapter_loads=st.integers(0, 2),
)


def whole(record: ReplicaRecord) -> ReplicaChange:
    return ReplicaChange(id=record.id, record=record)


def checked_at(state: DirectoryState, first: float, last: float) -> list[str]:
    """The states after a look at each second, as gateways have it looked, from one moment to the other."""
    for moment in range(int(first), int(last) + 1):
        state.mark_silent(float(moment))
    return [replica.state for replica in state.snapshot().replicas]


def test_a_heartbeat_is_no_change_and_a_change_of_load_is() -> None:
    state = DirectoryState()
    assert state.report(whole(A), 0.0)
    assert not state.report(ReplicaChange(id="a"), 1.0) and not state.report(whole(A), 1.0)
    busy = replace(A, running=5)
    assert state.report(difference(A, busy), 2.0)
    assert state.snapshot().replicas == (busy,) and state.version == 3


def test_changes_of_a_replica_that_is_not_known_are_refused_until_it_sends_its_record() -> None:
    state = DirectoryState()
    with pytest.raises(UnknownReplicaError):
        state.report(ReplicaChange(id="a"), 0.0)
    assert state.snapshot().replicas == ()


def test_a_load_of_one_adapter_costs_bytes_for_one_adapter() -> None:
    state = DirectoryState()
    full = replace(A, adapters=tuple(f"adapter-{n}@1" for n in range(32)))
    state.report(whole(full), 0.0)
    version = state.version
    state.report(difference(normalised(full), normalised(replace(full, adapters=(*full.adapters, "new@1")))), 1.0)
    sent = state.changes_since(state.epoch, version)
    assert isinstance(sent, Changes)
    (change,) = sent.changed
    assert change.record is None and change.adapters.added == ("new@1",) and change.adapters.removed == ()


def test_time_in_which_the_directory_was_unreachable_is_not_the_replicas_silence() -> None:
    state = DirectoryState()
    state.report(whole(A), 1.0)
    assert checked_at(state, 0, 3) == ["ready"]
    # For 30 s neither a replica nor a gateway gets through to it.
    assert checked_at(state, 33, 33 + SILENT_AFTER_S - 2) == ["ready"]
    assert checked_at(state, 33 + SILENT_AFTER_S - 2, 33 + SILENT_AFTER_S) == ["silent"]


def test_a_silent_replica_is_marked_then_removed_and_returns_with_a_heartbeat() -> None:
    state = DirectoryState()
    state.report(whole(A), 0.0)
    assert checked_at(state, 0, SILENT_AFTER_S) == ["ready"]
    assert state.mark_silent(SILENT_AFTER_S + 1)
    assert [r.state for r in state.snapshot().replicas] == ["silent"]
    assert not state.mark_silent(SILENT_AFTER_S + 2)
    # An empty report is enough: it returns in the state that it was in.
    assert state.report(ReplicaChange(id="a"), SILENT_AFTER_S + 3)
    assert state.snapshot().replicas == (A,)
    assert checked_at(state, SILENT_AFTER_S + 3, SILENT_AFTER_S + 3 + LOST_TTL_S) == ["silent"]
    assert state.mark_silent(SILENT_AFTER_S + 4 + LOST_TTL_S)
    assert state.snapshot().replicas == ()
    with pytest.raises(UnknownReplicaError):
        state.report(ReplicaChange(id="a"), SILENT_AFTER_S + 5 + LOST_TTL_S)
    assert state.report(whole(A), SILENT_AFTER_S + 5 + LOST_TTL_S)


def test_a_gateway_of_another_epoch_or_too_old_a_version_gets_a_snapshot() -> None:
    state = DirectoryState(_log=deque(maxlen=2))
    for running in range(4):
        state.report(whole(replace(A, running=running)), 0.0)
    assert isinstance(state.changes_since(state.epoch, state.version), Changes)
    assert isinstance(state.changes_since(state.epoch, state.version - 2), Changes)
    assert isinstance(state.changes_since(state.epoch, state.version - 3), Snapshot)
    assert isinstance(state.changes_since(state.epoch, state.version + 1), Snapshot)
    assert isinstance(state.changes_since(state.epoch - 1, state.version), Snapshot)


def test_changes_that_do_not_follow_on_the_copys_version_are_refused_and_leave_it_as_it_is() -> None:
    state, view = DirectoryState(), FleetView()
    state.report(whole(A), 0.0)
    view.apply(state.snapshot())
    state.report(whole(replace(A, running=1)), 0.0)
    state.report(whole(replace(A, running=2)), 0.0)
    with pytest.raises(VersionMismatchError):
        view.apply(state.changes_since(state.epoch, state.version - 1))
    assert view.records == {"a": A}


@given(RECORDS, st.lists(RECORDS, min_size=1, max_size=4))
def test_merged_changes_have_the_effect_of_one_after_the_other(first: ReplicaRecord, rest: list[ReplicaRecord]) -> None:
    before = record = normalised(first)
    total: ReplicaChange | None = None
    for each in rest:
        after = normalised(replace(each, id=first.id))
        change = difference(record, after)
        total = change if total is None else merged(total, change)
        record = applied(record, change)
        assert record == after
    assert total is not None and applied(before, total) == record


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("report"), RECORDS),
        st.tuples(st.just("leave"), st.sampled_from("abc")),
        st.tuples(st.just("wait"), st.integers(1, 40)),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("forget"), st.integers(0, 2)),
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(STEPS)
def test_after_any_sequence_of_reports_losses_and_resyncs_every_copy_equals_the_directory(
    steps: list[tuple[str, object]],
) -> None:
    epoch, now = 1, 0.0
    state = DirectoryState(epoch=epoch, _log=deque(maxlen=6))
    views = [FleetView() for _ in range(3)]
    reported: dict[str, ReplicaRecord] = {}

    def read(view: FleetView) -> None:
        before = dict(view.records)
        change = view.apply(state.changes_since(view.epoch, view.version))
        for record in change.removed:
            del before[record.id]
        before |= {record.id: record for record in change.changed}
        # What a view says of its changes is all that has changed: routers are kept by it alone.
        assert before == view.records

    for kind, value in steps:
        if kind == "report":
            assert isinstance(value, ReplicaRecord)
            record, known = normalised(value), reported.get(value.id)
            try:
                state.report(whole(record) if known is None else difference(known, record), now)
            except UnknownReplicaError:
                state.report(whole(record), now)
            reported[record.id] = record
        elif kind == "leave":
            state.remove(str(value))
            reported.pop(str(value), None)
        elif kind == "wait":
            assert isinstance(value, int)
            for _ in range(value):
                now += 1.0
                state.mark_silent(now)
        elif kind == "restart":
            epoch += 1
            state, reported = DirectoryState(epoch=epoch, _log=deque(maxlen=6)), {}
        elif kind == "read":
            assert isinstance(value, int)
            read(views[value])
        else:
            assert isinstance(value, int)
            views[value] = FleetView()
    for view in views:
        read(view)
        assert view.records == state.records and view.lost == {r.id for r in state.records.values() if r.lost}


def test_a_restarted_directory_removes_no_known_replica_until_it_is_complete() -> None:
    view = FleetView()
    b = replace(A, id="b")
    view.apply(Snapshot(epoch=1, version=5, replicas=(A, b)))
    view.apply(Snapshot(epoch=2, version=1, complete=False))
    assert view.records == {"a": A, "b": b} and view.carried_over == {"a", "b"}
    joined = Changes(epoch=2, since=1, version=2, complete=False, changed=(whole(replace(A, state="draining")),))
    assert view.apply(joined).never_reported == ()
    assert view.records["a"].state == "draining" and view.records["b"] == b
    # One that leaves the new directory while that is still incomplete has left.
    view.apply(Changes(epoch=2, since=2, version=3, complete=False, removed=("a",)))
    assert set(view.records) == {"b"}
    change = view.apply(Changes(epoch=2, since=3, version=3))
    assert change.never_reported == (b,) and change.removed == (b,) and view.records == {}


def test_waiting_counts_are_summed_over_gateways_and_expire() -> None:
    demand = WaitingCounts()
    demand.update("g1", {"engine-a": 2, "engine-b": 0}, 0.0)
    demand.update("g2", {"engine-a": 3}, 2.0)
    assert demand.total("engine-a", 2.0) == 5 and demand.total("engine-b", 2.0) == 0
    assert demand.total("engine-a", DEMAND_TTL_S + 1) == 3
    demand.update("g2", {}, DEMAND_TTL_S + 1)
    assert demand.total("engine-a", DEMAND_TTL_S + 1) == 0 and set(demand.reports) == {"g2"}


def test_the_repr_of_a_record_hides_the_token() -> None:
    assert "token" not in repr(A)
