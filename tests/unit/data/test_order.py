"""The order of rows is the seed's alone: any number of ranks shares it, and a resumed run goes on in it, row for row."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.data.order import Order, RowPosition, Sampler, ShardPosition
from tandem.errors import DataError


@dataclass(frozen=True)
class Data:
    """Datasets with known rows."""

    counts: tuple[tuple[int, ...], ...]
    """Rows of each shard of each dataset."""
    order: Order

    def sampler(self, state: dict | None = None) -> Sampler:
        return Sampler(self.order, lambda position: self.counts[position.dataset][self.order.shard(position)], state)

    def first(self, count: int) -> list[RowPosition]:
        sampler = self.sampler()
        return [next(sampler) for _ in range(count)]


def data(*counts: list[int], weights: list[float] | None = None, seed: int = 0, **settings: object) -> Data:
    order = Order(shards=tuple(map(len, counts)), weights=tuple(weights or [1.0] * len(counts)), seed=seed, **settings)  # type: ignore[arg-type]
    return Data(tuple(map(tuple, counts)), order)


# Some shards pack into no row at all; never all of a dataset.
shard_counts = st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any)
mixtures = st.builds(
    lambda parts, seed, shuffle, open_shards: data(
        *(counts for counts, _ in parts),
        weights=[weight for _, weight in parts],
        seed=seed,
        shuffle=shuffle,
        open_shards=open_shards,
    ),
    st.lists(st.tuples(shard_counts, st.floats(0.01, 50)), min_size=1, max_size=4),
    st.integers(0, 2**40),
    st.booleans(),
    st.integers(1, 9),
)


@given(mixtures, st.data())
def test_runs_killed_at_any_step_and_resumed_on_any_number_of_ranks_see_the_batches_of_one_undisturbed_run(
    found: Data, draw: st.DataObject
):
    batch_size = draw.draw(st.sampled_from([1, 2, 4, 6, 12]))
    worlds = st.sampled_from([w for w in (1, 2, 3, 4, 6, 12) if batch_size % w == 0])
    # Small datasets: these are several epochs.
    runs = draw.draw(st.lists(st.tuples(worlds, st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=5))
    batches: list[list[RowPosition]] = []
    checkpoint: str | None = None
    done = 0
    for world, steps, lost in runs:
        ranks = [found.sampler(checkpoint and json.loads(checkpoint)) for _ in range(world)]
        saved = [checkpoint]
        for _ in range(steps):
            shares = [sampler.share(rank, world, batch_size // world) for rank, sampler in enumerate(ranks)]
            batches.append([shares[n % world][n // world] for n in range(batch_size)])
            states = {json.dumps(sampler.state()) for sampler in ranks}
            # Every rank knows the position of all of them.
            assert len(states) == 1
            saved.extend(states)
        # Killed after `steps`, when the newest checkpoint is `lost` steps old.
        kept = max(0, steps - lost)
        checkpoint, done = saved[kept], done + kept
        del batches[done:]
    undisturbed = found.first(done * batch_size)
    assert [row for batch in batches for row in batch] == undisturbed


@given(shard_counts, st.integers(0, 9), st.booleans(), st.integers(1, 9))
def test_every_epoch_holds_every_row_once(counts: list[int], seed: int, shuffle: bool, open_shards: int):
    found = data(counts, seed=seed, shuffle=shuffle, open_shards=open_shards)
    every = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    rows = found.first(3 * len(every))
    for epoch in range(3):
        passed = rows[epoch * len(every) : (epoch + 1) * len(every)]
        assert sorted((r.shard, r.row) for r in passed) == every
        assert {r.epoch for r in passed} == {epoch}


@given(mixtures, st.integers(1, 400))
def test_a_mixture_has_its_weights_in_any_stretch(found: Data, start: int):
    weights = found.order.weights
    count = 200
    dealt = Counter(found.order.dataset(n) for n in range(start, start + count))
    for number, weight in enumerate(weights):
        # Multiples of the golden ratio stray by the logarithm of their number at most.
        assert abs(dealt[number] - count * weight / sum(weights)) < 6


@given(mixtures)
def test_each_dataset_of_a_mixture_goes_as_it_would_alone(found: Data):
    rows = found.first(60)
    for number in range(len(found.counts)):
        mine = [row for row in rows if row.dataset == number]
        heavy = replace(found.order, weights=tuple(1.0 if n == number else 0.0 for n in range(len(found.counts))))
        sampler = Data(found.counts, heavy).sampler()
        assert mine == list(islice((next(sampler) for _ in mine), len(mine)))


def test_epochs_seeds_and_datasets_differ_and_repeat():
    counts = [[5] * 9]
    assert data(*counts).first(90) == data(*counts).first(90)
    first, second = ([(r.shard, r.row) for r in data(*counts).first(90)][part] for part in (slice(45), slice(45, 90)))
    assert first != second
    assert first != [(r.shard, r.row) for r in data(*counts, seed=1).first(45)]
    both = data(*counts, *counts).first(180)
    ours, theirs = ([(r.shard, r.row) for r in both if r.dataset == n][:45] for n in (0, 1))
    assert ours == first and theirs != first
    # Not only the rows of a shard: the shards themselves come in orders of their own.
    orders = [
        [data(*counts, *counts, seed=seed).order.shard(ShardPosition(number, epoch, ordinal)) for ordinal in range(9)]
        for seed in (0, 1)
        for number in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(map(tuple, orders))) == 8 and all(sorted(order) == list(range(9)) for order in orders)


def test_without_shuffling_open_shards_take_turns_in_their_own_order():
    rows = data([2, 3, 1], shuffle=False, open_shards=2).first(8)
    assert [(r.shard, r.row) for r in rows] == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (1, 2), (0, 0), (1, 0)]


def test_the_rows_of_a_single_shard_are_shuffled_too():
    rows = [row.row for row in data([40]).first(80)]
    assert sorted(rows[:40]) == list(range(40)) != rows[:40] != rows[40:]


def test_a_dataset_without_rows_says_so_instead_of_spinning():
    with pytest.raises(DataError, match="No usable row came from any of the 3 shards of dataset 0"):
        next(data([0, 0, 0]).sampler())


def test_a_walk_tells_which_shards_it_will_come_to():
    found = data([3] * 5, [4] * 3, open_shards=2, weights=[1, 1])
    sampler = found.sampler()
    assert sampler.upcoming_shards(2) == [
        ShardPosition(0, 0, 0),
        ShardPosition(0, 0, 1),
        ShardPosition(1, 0, 0),
        ShardPosition(1, 0, 1),
    ]
    for _ in range(40):
        told = set(sampler.upcoming_shards(2))
        assert next(sampler)[:3] in told
    # The position after an epoch's last one is the next epoch's first.
    assert found.order.next_position(ShardPosition(1, 4, 2)) == ShardPosition(1, 5, 0)
