"""What is read when: blocks that were asked for come first, then those that will be, and no more of them than may lie ready."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tandem.config import DataConfig
from tandem.data import feed
from tandem.data.feed import Feed
from tandem.data.order import Order, Place
from tandem.data.spec import PackSpec, Source
from tandem.data.tokenize import TextEncoder


class Reading(Feed):
    """A feed whose blocks are the names of their places; Ray Data is not asked."""

    def __init__(
        self, shards: tuple[int, ...], *, held: bool = False, weights: tuple[float, ...] = (), **settings: Any
    ):
        self.plans: list[list[Place]] = []
        self.read: list[Place] = []
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

    def _packed(self, plan: list[Place]) -> Iterator[Any]:
        self.plans.append(plan)
        for place in plan:
            self.gate.acquire()
            if self.failing:
                self.failing -= 1
                raise OSError("no luck")
            self.read.append(place)
            yield f"block {place.dataset} {self._order.shard(place)}"

    def ask(self, *places: tuple[int, int, int], taker: int = 0, takers: int = 1, lost: bool = False) -> list[Any]:
        async def wait() -> Any:
            return await asyncio.wait_for(self.blocks([Place(*p) for p in places], taker, takers, lost), 5)

        return [reference for (reference,) in asyncio.run(wait())]


def settled(feed: Reading) -> list[Place]:
    """What has been read once nothing more is."""
    before = -1
    while before != len(feed.read):
        before = len(feed.read)
        time.sleep(0.05)
    return feed.read


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_blocks_are_read_ahead_up_to_the_limit_and_more_as_they_are_taken():
    feed = Reading((9,), read_ahead=3)
    assert settled(feed) == [Place(0, 0, n) for n in range(3)]
    assert feed.ask((0, 0, 0)) == ["block 0 0"]
    until(lambda: len(feed.read) == 4)
    assert feed.ask((0, 0, 6)) == ["block 0 6"]
    # Past the end of an epoch the next one is read.
    for ordinal in (7, 8):
        feed.ask((0, 0, ordinal))
    until(lambda: Place(0, 1, 0) in feed.read)
    assert len(feed.read) == len(set(feed.read))


def test_a_run_that_goes_on_reads_the_open_shards_and_what_follows_and_nothing_between():
    feed = Reading((90,), read_ahead=2)
    settled(feed)
    del feed.read[:]
    assert feed.ask((0, 3, 60), (0, 3, 41), (0, 3, 55)) == ["block 0 60", "block 0 41", "block 0 55"]
    found = settled(feed)
    assert found == [Place(0, 3, n) for n in (41, 55, 60, 61, 62)]
    # Going back is as good.
    del feed.read[:]
    assert feed.ask((0, 0, 7)) == ["block 0 7"]
    assert settled(feed) == [Place(0, 0, n) for n in (7, 8, 9)]


def test_a_block_is_let_go_when_all_have_taken_it_and_read_again_for_who_asks_then():
    feed = Reading((50,), read_ahead=1)
    settled(feed)
    feed.ask((0, 0, 0), taker=0, takers=2)
    feed.ask((0, 0, 0), taker=0, takers=2)
    feed.ask((0, 0, 0), taker=1, takers=2)
    assert feed.read.count(Place(0, 0, 0)) == 1
    feed.ask((0, 0, 0), taker=1, takers=2)
    assert feed.read.count(Place(0, 0, 0)) == 2


@pytest.mark.parametrize("held", [False, True])
def test_a_block_that_was_lost_is_read_again(held: bool):
    feed = Reading((50,), held=held, read_ahead=1)
    for lost in (False, False, True):
        assert feed.ask((0, 0, 3), (0, 0, 4), taker=0, takers=2, lost=lost) == ["block 0 3", "block 0 4"]
        assert settled(feed).count(Place(0, 0, 3)) == 1 + lost


def test_one_that_never_comes_does_not_keep_blocks_for_ever():
    feed = Reading((50,), read_ahead=1)
    for ordinal in range(40):
        feed.ask((0, 0, ordinal), taker=0, takers=2)
    assert len(feed._blocks) < 20


def test_a_held_block_is_read_once_for_all_epochs():
    feed = Reading((5,), held=True, read_ahead=2)
    for epoch in range(3):
        for ordinal in range(5):
            assert feed.ask((0, epoch, ordinal)) == [f"block 0 {ordinal}"]
    assert sorted(settled(feed)) == [Place(0, 0, n) for n in range(5)]


def test_datasets_are_read_ahead_in_the_proportion_of_their_weights():
    feed = Reading((100, 100), weights=(3.0, 1.0), read_ahead=24)
    found = settled(feed)
    assert sum(place.dataset == 0 for place in found) == 18


def test_what_is_asked_for_comes_although_enough_of_another_dataset_lies_ready():
    feed = Reading((100, 100), weights=(1000.0, 1.0), read_ahead=2)
    settled(feed)
    assert feed.ask((1, 0, 0), (1, 0, 1)) == ["block 1 0", "block 1 1"]
    assert feed.ask((0, 0, 0)) == ["block 0 0"]


def test_waiting_for_one_thing_is_not_forgotten_when_another_is_wanted_first():
    feed = Reading((60, 60), read_ahead=2)
    settled(feed)
    feed.gate = threading.Semaphore(0)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(feed.ask((0, 0, 5))))
    first.start()
    until(lambda: Place(0, 0, 5) in feed._waiting)
    second = threading.Thread(target=lambda: answers.append(feed.ask((0, 4, 30), (1, 2, 2))))
    second.start()
    until(lambda: Place(0, 4, 30) in feed._waiting)
    feed.gate.release(10**6)
    first.join(5)
    second.join(5)
    assert sorted(map(sorted, answers)) == [["block 0 30", "block 1 2"], ["block 0 5"]]


def test_who_waits_hears_of_a_failure_and_may_ask_again():
    feed = Reading((9,), read_ahead=1)
    settled(feed)
    feed.failing = 1
    with pytest.raises(RuntimeError, match="Reading data failed: OSError: no luck"):
        feed.ask((0, 0, 4))
    assert feed.ask((0, 0, 4)) == ["block 0 4"]


def test_small_shards_are_packed_several_to_a_task_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch):
    found = Reading((9,))
    settled(found)
    plan = [Place(0, 0, n) for n in (4, 2, 7, 1, 0)]
    # Each is of 100 bytes.
    for least, expected in ((1, [1, 1, 1, 1, 1]), (250, [3, 2]), (2**20, [5])):
        monkeypatch.setattr(feed, "TASK_BYTES", least)
        groups = found._groups(plan)
        assert [len(group) for group in groups] == expected
        assert [source.paths for group in groups for source in group] == [(f"shard {n}",) for n in (4, 2, 7, 1, 0)]
