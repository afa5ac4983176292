from __future__ import annotations

import asyncio
from dataclasses import replace

from tandem.serve.directory import FORGET_S, SILENCE_S, Directory, Ledger
from tandem.serve.records import ReplicaRecord

A = ReplicaRecord(id="a", base="base@1", url="http://a", token="t")


def test_a_new_replica_a_new_state_and_new_adapters_are_changes_and_load_is_not() -> None:
    ledger = Ledger(version=1)
    assert ledger.hear(A, 0.0)
    assert not ledger.hear(replace(A, running=5, waiting=2, kv_usage=0.5), 1.0)
    assert ledger.snapshot().replicas[0].running == 5
    assert ledger.hear(replace(A, adapters=("red@1",)), 2.0)
    assert ledger.hear(replace(A, state="draining"), 3.0)
    assert ledger.version == 4


def test_a_silent_replica_is_marked_then_forgotten_and_comes_back_with_its_next_beat() -> None:
    ledger = Ledger()
    ledger.hear(A, 0.0)
    assert not ledger.mark_silent(SILENCE_S)
    assert ledger.mark_silent(SILENCE_S + 1)
    assert [r.state for r in ledger.snapshot().replicas] == ["silent"]
    assert not ledger.mark_silent(SILENCE_S + 2)
    assert ledger.hear(A, SILENCE_S + 3)
    assert ledger.snapshot().replicas == (A,)
    assert ledger.mark_silent(SILENCE_S + 4 + FORGET_S)
    assert ledger.snapshot().replicas == ()
    assert ledger.hear(A, SILENCE_S + 5 + FORGET_S)


def test_two_ledgers_can_be_told_apart() -> None:
    assert Ledger().snapshot().born != Ledger().snapshot().born


def test_a_restarted_ledger_does_not_repeat_versions() -> None:
    first = Ledger()
    first.hear(A, 0.0)
    assert Ledger().version > first.version


def test_the_token_is_not_shown() -> None:
    assert "token" not in repr(A)


async def test_a_watcher_hears_of_a_change_at_once() -> None:
    directory = Directory()
    known = await directory.watch(0)
    waiting = asyncio.create_task(directory.watch(known.version))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await directory.heartbeat(A)
    assert (await asyncio.wait_for(waiting, 0.5)).replicas == (A,)
    await directory.leave("a")
    assert (await directory.watch(known.version)).replicas == ()
