"""Ejection of replicas that fail requests: how long, what ends it, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import replace

import pytest

from tandem.gateway.replicas import fleet as fleet_module
from tandem.gateway.replicas import suspects as suspects_module
from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.replicas.suspects import FIRST_EJECTION_S, LONGEST_EJECTION_S, Suspects
from tandem.routing.changes import Changes, Load, ReplicaChange
from tandem.routing.fleet_view import VersionMismatchError
from tandem.routing.records import ReplicaRecord, Snapshot
from tandem.routing.request import RoutingRequest

A = ReplicaRecord(id="a", pool="base@1", deployment="engine-base", url="http://a:1", token="t")
B = replace(A, id="b", url="http://b:1")
OTHER = replace(A, id="o", pool="other@1", deployment="engine-other")
REQUEST = RoutingRequest(pool="base@1")


async def never(version: int) -> Snapshot:
    raise NotImplementedError


def followed(*replicas: ReplicaRecord) -> tuple[Fleet, list[Collection[str] | None]]:
    """A fleet that knows these replicas, and what its listener was called with since."""
    fleet, heard = Fleet(never), []
    fleet.apply(Snapshot(version=1, replicas=replicas))
    fleet.add_listener(heard.append)
    return fleet, heard


def test_each_incident_doubles_the_ejection_up_to_a_minute_and_an_answer_ends_the_count() -> None:
    suspects, times = Suspects(), []
    for _ in range(7):
        times.append(suspects.suspect("a"))
        # Other requests that the same incident broke do not count.
        assert suspects.suspect("a") is None
        assert suspects.readmit("a") and not suspects.readmit("a")
    assert times == [3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0]
    assert times[0] == FIRST_EJECTION_S and times[-1] == LONGEST_EJECTION_S
    assert not suspects.answered("a") and suspects.suspect("a") == 3.0
    assert suspects.probe_failed("a") == 6.0 and suspects.answered("a") and suspects.probe_failed("a") is None
    suspects.suspect("b")
    suspects.forget(["b"])
    assert not suspects.ejected and not suspects.failures


async def test_an_ejected_replica_returns_only_when_a_probe_finds_it_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects_module, "FIRST_EJECTION_S", 0.01)
    fleet, _ = followed(A, B)
    answers, asked = [False, False, True], []

    async def probe(replica: ReplicaRecord) -> bool:
        asked.append(replica.id)
        return answers[len(asked) - 1]

    fleet.probe = probe
    fleet.suspect(A)
    while len(asked) < 3:
        assert fleet.ready("base@1", suspects=True) == [B]
        assert fleet.choose(REQUEST, ()) == B
        await asyncio.sleep(0.005)
    while len(fleet.ready("base@1", suspects=False)) < 2:
        await asyncio.sleep(0.005)
    assert asked == ["a", "a", "a"]
    await fleet.stop()


async def test_an_ejected_replica_that_has_left_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects_module, "FIRST_EJECTION_S", 0.05)
    fleet, _ = followed(A, B)
    asked = []

    async def probe(replica: ReplicaRecord) -> bool:
        asked.append(replica.id)
        return False

    fleet.probe = probe
    fleet.suspect(A)
    fleet.apply(Changes(epoch=0, since=1, version=2, removed=("a",)))
    await asyncio.sleep(0.2)
    assert asked == [] and not fleet._probing


async def test_a_suspect_gets_requests_where_there_is_no_other() -> None:
    fleet, _ = followed(A)
    fleet.suspect(A)
    assert fleet.choose(REQUEST, ()) == A
    assert fleet.ready("base@1", suspects=True) == [A] and fleet.ready("base@1", suspects=False) == []
    fleet.answered(REQUEST, A)
    assert fleet.ready("base@1", suspects=False) == [A]
    await fleet.stop()


async def test_a_suspicion_refreshes_its_own_pool_once_however_many_requests_fail() -> None:
    fleet, heard = followed(A, B, OTHER)
    for _ in range(100):
        fleet.suspect(A)
    assert heard == [{"base@1", "engine-base"}]
    await fleet.stop()


async def test_listeners_hear_of_changed_pools_and_of_everything_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, heard = followed(A, OTHER)
    busy = ReplicaChange(id="a", load=Load(3, 0, 0.5))
    fleet.apply(Changes(epoch=0, since=1, version=2, changed=(busy,)))
    # A load alone changes nobody's limits.
    assert heard == [] and {replica.id: replica.running for replica in fleet.replicas}["a"] == 3
    gone = ReplicaChange(id="o", record=replace(OTHER, state="draining"))
    fleet.apply(Changes(epoch=0, since=2, version=3, changed=(gone,)))
    assert heard == [{"other@1", "engine-other"}] and not fleet.has_pool("other@1")
    monkeypatch.setattr(fleet_module, "NOTIFY_S", 0.0)
    fleet.apply(Changes(epoch=0, since=3, version=3))
    assert heard[1:] == [None]


async def test_a_lost_replica_is_reported_at_once_and_then_every_second_not_with_every_change() -> None:
    fleet, _ = followed(A, B)
    lost: list[str] = []
    fleet.on_lost = lambda replica: lost.append(replica.id)
    silent = ReplicaChange(id="a", record=replace(A, state="silent"))
    fleet.apply(Changes(epoch=0, since=1, version=2, changed=(silent,)))
    for version in range(2, 6):
        load = ReplicaChange(id="b", load=Load(version, 0, 0.0))
        fleet.apply(Changes(epoch=0, since=version, version=version + 1, changed=(load,)))
    assert lost == ["a"]
    fleet._notified_at -= fleet_module.NOTIFY_S
    fleet.apply(Changes(epoch=0, since=6, version=6))
    assert lost == ["a", "a"]


async def test_after_changes_that_do_not_fit_the_directory_is_asked_for_a_snapshot() -> None:
    asked: list[int] = []

    async def watch(version: int) -> Snapshot | Changes:
        asked.append(version)
        if len(asked) == 2:
            return Changes(epoch=9, since=77, version=78)
        await asyncio.sleep(0.01)
        return Snapshot(version=5, replicas=(A,))

    fleet = Fleet(watch)
    await fleet.start()
    async with asyncio.timeout(10):
        while len(asked) < 4:
            await asyncio.sleep(0.01)
    assert asked[:4] == [0, 5, 0, 5] and fleet.replicas == (A,)
    await fleet.stop()
    with pytest.raises(VersionMismatchError):
        fleet.apply(Changes(epoch=9, since=77, version=78))


async def test_a_copy_of_the_directory_is_stale_after_a_while_without_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(never)
    assert not fleet.fresh
    fleet.apply(Snapshot(version=1, complete=False))
    fleet._always_on = {"base@1"}
    fleet._synced.clear()
    assert not fleet.fresh
    fleet.apply(Snapshot(version=2, replicas=(A,)))
    assert fleet.fresh
    fleet._updated_at -= fleet_module.STALE_AFTER_S
    assert fleet.synced and not fleet.fresh
    fleet.apply(Changes(epoch=0, since=2, version=2))
    assert fleet.fresh


async def test_the_tasks_of_a_pool_are_known_while_it_has_replicas() -> None:
    fleet, _ = followed(A, replace(OTHER, tasks=("embed",)))
    assert fleet.tasks == {"other@1": ("embed",)}
    fleet.apply(Changes(epoch=0, since=1, version=2, removed=("o",)))
    assert fleet.tasks == {}
