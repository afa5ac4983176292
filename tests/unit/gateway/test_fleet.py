"""Fleet: snapshots of the directory, lost replicas, probes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tandem.gateway.replicas.fleet import Fleet
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.request import RoutingRequest

A = ReplicaRecord(id="a", pool="base@1", url="http://a:1", token="t")
B = replace(A, id="b", url="http://b:1")
REQUEST = RoutingRequest(pool="base@1")


def fleet() -> tuple[Fleet, list[str]]:
    async def watch(version: int) -> Snapshot:
        raise NotImplementedError

    lost: list[str] = []
    made = Fleet(watch)
    made.on_lost = lambda replica: lost.append(replica.id)
    return made, lost


def chosen(fleet: Fleet) -> set[str]:
    return {name for name in "ab" if fleet.choose(REQUEST, {"a", "b"} - {name}) is not None}


@pytest.mark.parametrize("state", ["stuck", "silent"])
def test_a_lost_replica_is_reported_with_every_snapshot_and_not_chosen(state: str) -> None:
    it, lost = fleet()
    it.apply(Snapshot(version=1, replicas=(A, B)))
    gone = replace(A, state=state)  # type: ignore[arg-type]
    it.apply(Snapshot(version=2, replicas=(gone, B)))
    it.apply(Snapshot(version=3, replicas=(gone, B)))
    assert lost == ["a", "a"] and chosen(it) == {"b"}


def test_a_silent_replica_is_chosen_while_a_probe_has_confirmed_it() -> None:
    it, lost = fleet()
    silent = replace(A, state="silent")
    for version, (ready, expected) in enumerate(((None, set()), (True, {"a"}), (None, {"a"}), (False, set())), 1):
        if ready is not None:
            it.confirm(A, ready=ready)
        it.apply(Snapshot(version=version, replicas=(silent,)))
        assert chosen(it) == expected
    # It is heard again: what was said of it then is old.
    it.confirm(A, ready=True)
    for version, (record, expected) in enumerate(((silent, {"a"}), (A, {"a"}), (silent, set())), 5):
        it.apply(Snapshot(version=version, replicas=(record,)))
        assert chosen(it) == expected
    assert len(lost) == 6


def test_a_silent_replica_with_a_new_heartbeat_is_chosen_again() -> None:
    it, lost = fleet()
    for version, record in enumerate((A, replace(A, state="silent"), A, replace(A, state="silent")), 1):
        it.apply(Snapshot(version=version, replicas=(record,)))
        assert chosen(it) == ({"a"} if record is A else set())
    assert lost == ["a", "a"]


def test_a_replica_that_left_or_died_is_not_reported_as_lost() -> None:
    it, lost = fleet()
    it.apply(Snapshot(version=1, replicas=(A, B)))
    it.apply(Snapshot(version=2, replicas=(replace(B, state="dead"),)))
    assert lost == [] and chosen(it) == set()


async def test_replicas_missing_from_a_new_directorys_complete_snapshot_are_lost() -> None:
    it, lost = fleet()
    it.apply(Snapshot(version=1, replicas=(A, B)))
    it.apply(Snapshot(version=2, complete=False))
    assert chosen(it) == {"a", "b"}
    it.apply(Snapshot(version=3, replicas=(replace(A, state="draining"),), complete=False))
    assert chosen(it) == {"b"} and lost == []
    it.apply(Snapshot(version=4, replicas=(A,)))
    assert chosen(it) == {"a"} and lost == ["b"]
