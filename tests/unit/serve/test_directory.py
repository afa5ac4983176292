from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from tandem.routing.records import ReplicaRecord
from tandem.serve.directory import (
    DEMAND_TTL_S,
    LOST_TTL_S,
    SILENT_AFTER_S,
    WARM_UP_S,
    Directory,
    ReplicaTable,
    WaitingCounts,
)

A = ReplicaRecord(id="a", pool="base@1", url="http://a", token="t")


def test_load_alone_does_not_change_the_snapshot_version() -> None:
    ledger = ReplicaTable(version=1)
    assert ledger.update(A, 0.0)
    assert not ledger.update(replace(A, running=5, waiting=2, kv_usage=0.5), 1.0)
    assert ledger.snapshot().replicas[0].running == 5
    assert ledger.update(replace(A, adapters=("red@1",)), 2.0)
    assert ledger.update(replace(A, state="draining"), 3.0)
    assert ledger.version == 4


def checked_at(ledger: ReplicaTable, *moments: float) -> list[str]:
    """The states after a look at each second, as gateways have it looked, from one moment to the other."""
    for moment in range(int(moments[0]), int(moments[1]) + 1):
        ledger.mark_silent(float(moment))
    return [replica.state for replica in ledger.snapshot().replicas]


def test_time_in_which_the_directory_was_unreachable_is_not_the_replicas_silence() -> None:
    ledger = ReplicaTable()
    ledger.update(A, 1.0)
    assert checked_at(ledger, 0, 3) == ["ready"]
    # For 30 s neither a replica nor a gateway gets through to it.
    assert checked_at(ledger, 33, 33 + SILENT_AFTER_S - 2) == ["ready"]
    assert checked_at(ledger, 33 + SILENT_AFTER_S - 2, 33 + SILENT_AFTER_S) == ["silent"]


def test_a_silent_replica_is_marked_then_removed_and_returns_with_a_heartbeat() -> None:
    ledger = ReplicaTable()
    ledger.update(A, 0.0)
    assert checked_at(ledger, 0, SILENT_AFTER_S) == ["ready"]
    assert ledger.mark_silent(SILENT_AFTER_S + 1)
    assert [r.state for r in ledger.snapshot().replicas] == ["silent"]
    assert not ledger.mark_silent(SILENT_AFTER_S + 2)
    assert ledger.update(A, SILENT_AFTER_S + 3)
    assert ledger.snapshot().replicas == (A,)
    assert checked_at(ledger, SILENT_AFTER_S + 3, SILENT_AFTER_S + 3 + LOST_TTL_S) == ["silent"]
    assert ledger.mark_silent(SILENT_AFTER_S + 4 + LOST_TTL_S)
    assert ledger.snapshot().replicas == ()
    assert ledger.update(A, SILENT_AFTER_S + 5 + LOST_TTL_S)


def test_a_restarted_directory_does_not_repeat_versions() -> None:
    first = ReplicaTable()
    first.update(A, 0.0)
    assert ReplicaTable().version > first.version


def test_the_repr_of_a_record_hides_the_token() -> None:
    assert "token" not in repr(A)


async def test_watch_returns_at_a_change() -> None:
    directory = Directory()
    known = await directory.watch(0)
    waiting = asyncio.create_task(directory.watch(known.version))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await directory.heartbeat(A)
    assert (await asyncio.wait_for(waiting, 0.5)).replicas == (A,)
    await directory.leave("a")
    assert (await directory.watch(known.version)).replicas == ()


def test_waiting_counts_are_summed_over_gateways_and_expire() -> None:
    demand = WaitingCounts()
    demand.update("g1", {"engine-a": 2, "engine-b": 0}, 0.0)
    demand.update("g2", {"engine-a": 3}, 2.0)
    assert demand.total("engine-a", 2.0) == 5 and demand.total("engine-b", 2.0) == 0
    assert demand.total("engine-a", DEMAND_TTL_S + 1) == 3
    demand.update("g2", {}, DEMAND_TTL_S + 1)
    assert demand.total("engine-a", DEMAND_TTL_S + 1) == 0 and set(demand.reports) == {"g2"}


async def test_demand_wakes_a_model_without_replicas_once_and_is_in_heartbeat_replies() -> None:
    woken: list[str] = []
    up = asyncio.Event()

    async def wake(deployment: str) -> None:
        woken.append(deployment)
        await up.wait()

    directory = Directory(wake)
    for _ in range(3):
        await directory.demand("g1", {"engine-a": 4})
        await asyncio.sleep(0.01)
    assert woken == ["engine-a"]
    up.set()
    await asyncio.sleep(0.01)
    assert (await directory.heartbeat(replace(A, deployment="engine-a"))).waiting == 4
    await directory.demand("g1", {"engine-a": 4})
    await asyncio.sleep(0.01)
    assert woken == ["engine-a"]


async def test_a_wake_up_is_cancelled_when_no_request_waits() -> None:
    ended: list[str] = []

    async def wake(deployment: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(deployment)

    directory = Directory(wake)
    await directory.demand("g1", {"engine-a": 1})
    await asyncio.sleep(0.01)
    assert ended == []
    await directory.demand("g1", {})
    await asyncio.sleep(0.01)
    assert ended == ["engine-a"]


async def test_snapshots_of_a_new_directory_are_marked_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = Directory()
    assert not (await directory.watch(0)).complete
    monkeypatch.setattr(directory, "_began", directory._began - WARM_UP_S)
    assert (await directory.watch(0)).complete
