"""The order of rows is the seed's alone: any number of ranks shares it, and a resumed run goes on in it."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.order import Lane, epoch_order, held_rows, lane_count, lanes_of
from tandem.errors import DataError


@given(st.integers(1, 50), st.integers(0, 9), st.booleans())
def test_an_epoch_holds_every_row_once(total: int, seed: int, shuffle: bool):
    rows = list(islice(held_rows(total, seed, shuffle, 0, 1), 2 * total))
    assert sorted(rows[:total]) == sorted(rows[total:]) == list(range(total))


@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 4]), st.integers(0, 60))
def test_ranks_share_one_order_from_any_place(total: int, world: int, done: int):
    order = list(islice(held_rows(total, 3, True, 0, 1), 200))
    taken = done * world
    for rank in range(world):
        mine = list(islice(held_rows(total, 3, True, taken + rank, world), 20))
        assert mine == (order + list(islice(held_rows(total, 3, True, 200, 1), 200)))[taken + rank :: world][:20]


def test_epochs_and_seeds_differ_and_repeat():
    assert epoch_order(20, 1, 0, True).tolist() == epoch_order(20, 1, 0, True).tolist()
    assert epoch_order(20, 1, 0, True).tolist() != epoch_order(20, 1, 1, True).tolist()
    assert epoch_order(20, 1, 0, True).tolist() != epoch_order(20, 2, 0, True).tolist()
    assert epoch_order(4, 1, 5, False).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("shards", "workers", "lanes"), [(64, 1, 8), (64, 2, 8), (64, 3, 6), (5, 2, 4), (16, 16, 16)])
def test_lanes_are_a_multiple_of_workers_and_at_most_the_shards(shards: int, workers: int, lanes: int):
    assert lane_count(shards, workers) == lanes


def test_too_few_shards_or_a_number_of_workers_that_cannot_share_lanes_is_refused():
    with pytest.raises(DataError, match="3 shards for 4 workers"):
        lane_count(3, 4)
    with pytest.raises(DataError, match="8 lanes, which 3 workers"):
        lanes_of(0, 3, 8)


def test_lanes_deal_every_shard_once_an_epoch():
    for epoch in range(3):
        dealt = [s for n in range(4) for s in Lane(n, 4, 11, 7, True).epoch(epoch)]
        assert sorted(dealt) == list(range(11))


@given(st.integers(0, 60))
def test_a_lane_goes_on_after_what_was_skipped(skip: int):
    def read(shards: list[int]):
        return ((s, row) for s in shards for row in range(s % 3 + 1))

    lane = Lane(1, 2, 8, 5, True)
    assert list(islice(lane.rows(read, skip), 30)) == list(islice(lane.rows(read, 0), 100))[skip : skip + 30]


def test_a_lane_without_rows_says_so_instead_of_spinning():
    with pytest.raises(DataError, match="No usable row"):
        next(Lane(0, 1, 2, 0, True).rows(lambda shards: iter(()), 0))
