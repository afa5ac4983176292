"""What is read when: blocks that were asked for come first, then those that will be, and no more of them than may lie ready."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tandem.config import DataConfig
from tandem.data import reader
from tandem.data.order import Order, ShardPosition
from tandem.data.reader import ShardReader
from tandem.data.spec import PackSpec, Source
from tandem.data.tokenize import TextEncoder


class Reading(ShardReader):
    """A reader whose blocks are the names of their positions; Ray Data is not asked."""

    def __init__(
        self, shards: tuple[int, ...], *, held: bool = False, weights: tuple[float, ...] = (), **settings: Any
    ):
        self.plans: list[list[ShardPosition]] = []
        self.read: list[ShardPosition] = []
        self.failing = 0
        self.gate = threading.Semaphore(10**6)
        spec = PackSpec(encoder=TextEncoder("none"), kind="text", length=8, loss_on_all=False)
        sources = tuple(
            Source(
                spec=spec, paths=tuple(f"shard {n}" for n in range(count)), bytes=(100,) * count, digests=("",) * count
            )
            for count in shards
        )
        order = Order(shards=shards, weights=weights or (1.0,) * len(shards), seed=0, shuffle=False, open_shards=2)
        super().__init__(order, sources, DataConfig(path="x", **settings), held)

    def _pack(self, plan: list[ShardPosition]) -> Iterator[Any]:
        self.plans.append(plan)
        for position in plan:
            self.gate.acquire()
            if self.failing:
                self.failing -= 1
                raise OSError("no luck")
            self.read.append(position)
            yield f"block {position.dataset} {self._order.shard(position)}"

    def ask(self, *positions: tuple[int, int, int], taker: int = 0, takers: int = 1, lost: bool = False) -> list[Any]:
        async def wait() -> Any:
            return await asyncio.wait_for(self.blocks([ShardPosition(*p) for p in positions], taker, takers, lost), 5)

        return [reference for (reference,) in asyncio.run(wait())]


def settled(reader: Reading) -> list[ShardPosition]:
    """What has been read once nothing more is, for a second: its thread may have to wait for a CPU."""
    counts = [-1]
    while len(counts) < 20 or len(set(counts[-20:])) > 1:
        counts.append(len(reader.read))
        time.sleep(0.05)
    return reader.read


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_blocks_are_read_ahead_up_to_the_limit_and_more_as_they_are_taken():
    reader = Reading((9,), read_ahead=3)
    assert settled(reader) == [ShardPosition(0, 0, n) for n in range(3)]
    assert reader.ask((0, 0, 0)) == ["block 0 0"]
    until(lambda: len(reader.read) == 4)
    assert reader.ask((0, 0, 6)) == ["block 0 6"]
    # Past the end of an epoch the next one is read.
    for ordinal in (7, 8):
        reader.ask((0, 0, ordinal))
    until(lambda: ShardPosition(0, 1, 0) in reader.read)
    assert len(reader.read) == len(set(reader.read))


def test_a_run_that_goes_on_reads_the_open_shards_and_what_follows_and_nothing_between():
    reader = Reading((90,), read_ahead=2)
    settled(reader)
    del reader.read[:]
    assert reader.ask((0, 3, 60), (0, 3, 41), (0, 3, 55)) == ["block 0 60", "block 0 41", "block 0 55"]
    found = settled(reader)
    assert found == [ShardPosition(0, 3, n) for n in (41, 55, 60, 61, 62)]
    # Going back is as good.
    del reader.read[:]
    assert reader.ask((0, 0, 7)) == ["block 0 7"]
    assert settled(reader) == [ShardPosition(0, 0, n) for n in (7, 8, 9)]


def test_a_block_is_let_go_when_all_have_taken_it_and_read_again_for_who_asks_then():
    reader = Reading((50,), read_ahead=1)
    settled(reader)
    reader.ask((0, 0, 0), taker=0, takers=2)
    reader.ask((0, 0, 0), taker=0, takers=2)
    reader.ask((0, 0, 0), taker=1, takers=2)
    assert reader.read.count(ShardPosition(0, 0, 0)) == 1
    reader.ask((0, 0, 0), taker=1, takers=2)
    assert reader.read.count(ShardPosition(0, 0, 0)) == 2


@pytest.mark.parametrize("held", [False, True])
def test_a_block_that_was_lost_is_read_again(held: bool):
    reader = Reading((50,), held=held, read_ahead=1)
    for lost in (False, False, True):
        assert reader.ask((0, 0, 3), (0, 0, 4), taker=0, takers=2, lost=lost) == ["block 0 3", "block 0 4"]
        assert settled(reader).count(ShardPosition(0, 0, 3)) == 1 + lost


def test_one_that_never_comes_does_not_keep_blocks_for_ever():
    reader = Reading((50,), read_ahead=1)
    for ordinal in range(40):
        reader.ask((0, 0, ordinal), taker=0, takers=2)
    assert len(reader._blocks) < 20


def test_a_held_block_is_read_once_for_all_epochs():
    reader = Reading((5,), held=True, read_ahead=2)
    for epoch in range(3):
        for ordinal in range(5):
            assert reader.ask((0, epoch, ordinal)) == [f"block 0 {ordinal}"]
    assert sorted(settled(reader)) == [ShardPosition(0, 0, n) for n in range(5)]


def test_datasets_are_read_ahead_in_the_proportion_of_their_weights():
    reader = Reading((100, 100), weights=(3.0, 1.0), read_ahead=24)
    until(lambda: len(reader.read) >= 24)
    found = settled(reader)
    assert sum(position.dataset == 0 for position in found) == 18


def test_what_is_asked_for_comes_although_enough_of_another_dataset_lies_ready():
    reader = Reading((100, 100), weights=(1000.0, 1.0), read_ahead=2)
    settled(reader)
    assert reader.ask((1, 0, 0), (1, 0, 1)) == ["block 1 0", "block 1 1"]
    assert reader.ask((0, 0, 0)) == ["block 0 0"]


def test_waiting_for_one_thing_is_not_forgotten_when_another_is_wanted_first():
    reader = Reading((60, 60), read_ahead=2)
    settled(reader)
    reader.gate = threading.Semaphore(0)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(reader.ask((0, 0, 5))))
    first.start()
    until(lambda: ShardPosition(0, 0, 5) in reader._waiting)
    second = threading.Thread(target=lambda: answers.append(reader.ask((0, 4, 30), (1, 2, 2))))
    second.start()
    until(lambda: ShardPosition(0, 4, 30) in reader._waiting)
    reader.gate.release(10**6)
    first.join(5)
    second.join(5)
    assert sorted(map(sorted, answers)) == [["block 0 30", "block 1 2"], ["block 0 5"]]


def test_who_waits_hears_of_a_failure_and_may_ask_again():
    reader = Reading((9,), read_ahead=1)
    settled(reader)
    reader.failing = 1
    with pytest.raises(RuntimeError, match="Reading data failed: OSError: no luck"):
        reader.ask((0, 0, 4))
    assert reader.ask((0, 0, 4)) == ["block 0 4"]


def test_small_shards_are_packed_several_to_a_task_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch):
    found = Reading((9,))
    settled(found)
    plan = [ShardPosition(0, 0, n) for n in (4, 2, 7, 1, 0)]
    # Each is of 100 bytes.
    for least, expected in ((1, [1, 1, 1, 1, 1]), (250, [3, 2]), (2**20, [5])):
        monkeypatch.setattr(reader, "TASK_BYTES", least)
        groups = found._groups(plan)
        assert [len(group) for group in groups] == expected
        assert [source.paths for group in groups for source in group] == [(f"shard {n}",) for n in (4, 2, 7, 1, 0)]
