"""Order of rows: a pure function of the seed, so that a resumed run continues at the next row.

Rows have one global order, whatever the number of ranks that share them; rank r of W takes every W-th row. The order does not
depend on whether rows are kept in memory or read again, or on the number of tasks that read them.

- A dataset's rows: each epoch, its shards are shuffled. The first few are opened; rows come from the open shards in turn, and
  the rows of each shard are shuffled; a shard without further rows is replaced by the next one. An epoch ends with its last
  shard, so it has every row once.
- A mixture's rows: the number of a row decides its dataset, so that any range of rows has the datasets' weights; each dataset
  counts its own epochs.

The number of rows of a shard is known only once it is packed, so a sampler requests counts as it reaches shards. Its state is a
few numbers for each open shard; a checkpoint holds it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tandem.errors import DataError

_GOLDEN = 0x9E3779B97F4A7C15
_CIRCLE = 2**64


class ShardPosition(NamedTuple):
    """Position of a shard in the order of its dataset."""

    dataset: int
    epoch: int
    ordinal: int
    """Its position in the epoch."""


class RowPosition(NamedTuple):
    """Dataset, epoch and shard of a row, and its number in the shard."""

    dataset: int
    epoch: int
    ordinal: int
    shard: int
    """Its number in the dataset's index."""
    row: int
    """Its number among the rows that the shard packs into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """The parameters that decide the order of rows."""

    shards: tuple[int, ...]
    """Shards of each dataset."""
    weights: tuple[float, ...]
    """Shares of the rows that each dataset gives; they need not add up to 1."""
    seed: int
    shuffle: bool = True
    open_shards: int = 8
    """Shards of a dataset whose rows take turns."""

    def shard(self, position: ShardPosition) -> int:
        """The number of the shard at a position."""
        number, epoch, ordinal = position
        return int(_cached_order(self.shards[number], (self.seed, number, epoch), self.shuffle)[ordinal])

    def next_position(self, position: ShardPosition) -> ShardPosition:
        """The next shard of the same dataset."""
        number, epoch, ordinal = position
        return (
            ShardPosition(number, epoch, ordinal + 1)
            if ordinal + 1 < self.shards[number]
            else ShardPosition(number, epoch + 1, 0)
        )

    def row(self, position: ShardPosition, shard: int, turn: int, count: int) -> int:
        """Number of the row, of the shard's `count` rows, that is the `turn`-th in that epoch."""
        # One more than the shard's number: seeds that differ by zeros at their end are one seed to numpy.
        seed = (self.seed, position.dataset, position.epoch, 1 + shard)
        return int(_cached_rows(count, seed, self.shuffle)[turn])

    def dataset(self, number: int) -> int:
        """The dataset that gives the global row `number`."""
        if len(self.shards) == 1:
            return 0
        # Multiples of the golden ratio, modulo 1, fill every part of a circle as evenly as can be (Weyl; Knuth 6.4).
        point = (number * _GOLDEN + self.seed * 0x632BE59BD9B4E019) % _CIRCLE
        return bisect_right(_bounds(self.weights), point)


def permutation(count: int, seed: Sequence[int], shuffle: bool) -> npt.NDArray[np.int64]:
    """A permutation of `count` numbers; the identity without `shuffle`."""
    return np.random.default_rng(tuple(seed)).permutation(count) if shuffle else np.arange(count)


# Room for the open shards of a mixture of a hundred datasets: a permutation for every row would take longer than its step.
_cached_order = lru_cache(maxsize=256)(permutation)
_cached_rows = lru_cache(maxsize=1024)(permutation)


@lru_cache(maxsize=8)
def _bounds(weights: tuple[float, ...]) -> tuple[int, ...]:
    """The end of each dataset's part of the circle; exact, so that every machine computes the same."""
    cumulative = list(itertools.accumulate(Fraction(weight) for weight in weights))
    return tuple(int(end / cumulative[-1] * _CIRCLE) for end in cumulative[:-1])


class Sampler:
    """Iterates over the rows of an order, from the first one or from a saved `state`.

    `count(position)` gives the rows that a shard packs into. Raises DataError when a dataset has none at all.
    """

    def __init__(
        self, order: Order, count: Callable[[ShardPosition], int], state: Mapping[str, Any] | None = None
    ) -> None:
        self._order = order
        self.rows_sampled = 0
        """Number of rows returned so far."""
        self._datasets = [_DatasetSampler(order, number, count) for number in range(len(order.shards))]
        if state is not None:
            self.rows_sampled = int(state["rows"])
            for dataset, saved in zip(self._datasets, state["datasets"], strict=True):
                dataset.restore(saved)

    def __next__(self) -> RowPosition:
        number = self._order.dataset(self.rows_sampled)
        self.rows_sampled += 1
        return self._datasets[number].step()

    def share(self, rank: int, world: int, count: int) -> list[RowPosition]:
        """The `count` rows that are rank `rank`'s of the next `count` x `world`; advances past all of these."""
        return [
            position
            for number, position in enumerate(next(self) for _ in range(count * world))
            if number % world == rank
        ]

    def state(self) -> dict[str, Any]:
        """The state of the sampler, as JSON values."""
        return {"rows": self.rows_sampled, "datasets": [dataset.state() for dataset in self._datasets]}

    def upcoming_shards(self, count: int) -> list[ShardPosition]:
        """The open shards, and the next `count` of each dataset."""
        return [position for dataset in self._datasets for position in dataset.upcoming_shards(count)]


class _DatasetSampler:
    """The position in one dataset."""

    def __init__(self, order: Order, number: int, count: Callable[[ShardPosition], int]) -> None:
        self._order = order
        self._number = number
        self._count = count
        self._shards = order.shards[number]
        self._epoch = -1
        self._next = self._shards
        """The first ordinal that has not been opened."""
        self._open: deque[tuple[ShardPosition, int, int]] = deque()
        """Open shards in turn: position, number, and rows returned so far."""

    def step(self) -> RowPosition:
        empty_shards = 0
        while True:
            if not self._open:
                # After an epoch without rows, the next epoch has none either.
                if empty_shards >= self._shards:
                    raise DataError(
                        f"No usable row came from any of the {self._shards} shards of dataset {self._number}."
                    )
                self._epoch, self._next = self._epoch + 1, 0
                for _ in range(min(self._order.open_shards, self._shards)):
                    self._open.append(self._open_next())
            position, shard, rows_given = self._open[0]
            count = self._count(position)
            if rows_given < count:
                self._open.popleft()
                self._open.append((position, shard, rows_given + 1))
                return RowPosition(*position, shard, self._order.row(position, shard, rows_given, count))
            empty_shards = 0 if rows_given else empty_shards + 1
            self._open.popleft()
            if self._next < self._shards:
                self._open.appendleft(self._open_next())

    def _open_next(self) -> tuple[ShardPosition, int, int]:
        position = ShardPosition(self._number, self._epoch, self._next)
        self._next += 1
        return position, self._order.shard(position), 0

    def upcoming_shards(self, count: int) -> list[ShardPosition]:
        positions = [position for position, _, _ in self._open]
        position = ShardPosition(self._number, self._epoch, self._next - 1)
        for _ in range(count):
            position = self._order.next_position(position)
            positions.append(position)
        return positions

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "next": self._next,
            "open": [[position.ordinal, rows_given] for position, _, rows_given in self._open],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._next = int(state["epoch"]), int(state["next"])
        self._open.clear()
        for ordinal, rows_given in state["open"]:
            position = ShardPosition(self._number, self._epoch, int(ordinal))
            self._open.append((position, self._order.shard(position), int(rows_given)))
