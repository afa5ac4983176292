"""Order of rows: a pure function of the seed, so that a resumed run continues at the next row.

Rows have one global order, whatever the number of ranks that share them; rank r of W takes every W-th row. Nor does the order
know whether rows are kept in memory or read again, or how many tasks read them.

- A dataset's rows: each epoch, its shards are put in an order. The first few are opened; rows are taken from the open shards
  in turn, of each shard in an order of its own; a shard that has no more is replaced by the next one. An epoch ends when
  every shard has, so it holds every row once.
- A mixture's rows: the number of a row says which dataset gives it, so that any stretch of rows has the datasets' weights; each
  dataset counts epochs of its own.

How many rows a shard packs into is known once it is packed, so a sampler asks for counts as it comes to them. Where it stands is
a few numbers for each open shard, which is what a checkpoint keeps.
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
    """Where a shard stands in the order of its dataset."""

    dataset: int
    epoch: int
    ordinal: int
    """Its position in the epoch."""


class RowPosition(NamedTuple):
    """Where a row is found."""

    dataset: int
    epoch: int
    ordinal: int
    shard: int
    """Its number in the dataset's index."""
    row: int
    """Its number among the rows that the shard packs into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """All that decides the order of rows."""

    shards: tuple[int, ...]
    """Shards of each dataset."""
    weights: tuple[float, ...]
    """Shares of the rows that each dataset gives; they need not add up to 1."""
    seed: int
    shuffle: bool = True
    open_shards: int = 8
    """Shards of a dataset whose rows take turns."""

    def shard(self, position: ShardPosition) -> int:
        """The number of the shard that stands there."""
        number, epoch, ordinal = position
        return int(_cached_order(self.shards[number], (self.seed, number, epoch), self.shuffle)[ordinal])

    def after(self, position: ShardPosition) -> ShardPosition:
        """The next shard of the same dataset."""
        number, epoch, ordinal = position
        return (
            ShardPosition(number, epoch, ordinal + 1)
            if ordinal + 1 < self.shards[number]
            else ShardPosition(number, epoch + 1, 0)
        )

    def row(self, position: ShardPosition, shard: int, turn: int, count: int) -> int:
        """Which of the shard's `count` rows comes as its `turn`-th one in that epoch."""
        # One more than the shard's number: seeds that differ by zeros at their end are one seed to numpy.
        seed = (self.seed, position.dataset, position.epoch, 1 + shard)
        return int(_cached_rows(count, seed, self.shuffle)[turn])

    def dataset(self, number: int) -> int:
        """The dataset that gives the global row `number`."""
        if len(self.shards) == 1:
            return 0
        # Multiples of the golden ratio, modulo 1, fill every part of a circle as evenly as can be (Weyl; Knuth 6.4).
        at = (number * _GOLDEN + self.seed * 0x632BE59BD9B4E019) % _CIRCLE
        return bisect_right(_bounds(self.weights), at)


def permutation(count: int, seed: Sequence[int], shuffle: bool) -> npt.NDArray[np.int64]:
    """The order of `count` things."""
    return np.random.default_rng(tuple(seed)).permutation(count) if shuffle else np.arange(count)


# Room for the open shards of a mixture of a hundred datasets: a permutation for every row would take longer than its step.
_cached_order = lru_cache(maxsize=256)(permutation)
_cached_rows = lru_cache(maxsize=1024)(permutation)


@lru_cache(maxsize=8)
def _bounds(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Where each dataset's part of the circle ends; exact, so that every machine deals alike."""
    ends = list(itertools.accumulate(Fraction(weight) for weight in weights))
    return tuple(int(end / ends[-1] * _CIRCLE) for end in ends[:-1])


class Sampler:
    """Goes through the rows of an order, from the first one or from where a `state` stands.

    `count(position)` gives the rows that a shard packs into. Raises DataError when a dataset has none at all.
    """

    def __init__(
        self, order: Order, count: Callable[[ShardPosition], int], state: Mapping[str, Any] | None = None
    ) -> None:
        self._order = order
        self.taken = 0
        """Rows before the next one."""
        self._tracks = [_DatasetSampler(order, number, count) for number in range(len(order.shards))]
        if state is not None:
            self.taken = int(state["rows"])
            for track, saved in zip(self._tracks, state["datasets"], strict=True):
                track.restore(saved)

    def __next__(self) -> RowPosition:
        number = self._order.dataset(self.taken)
        self.taken += 1
        return self._tracks[number].step()

    def share(self, rank: int, world: int, count: int) -> list[RowPosition]:
        """The `count` rows that are rank `rank`'s of the next `count` x `world`; the sampler then stands after all of these."""
        return [found for n, found in enumerate(next(self) for _ in range(count * world)) if n % world == rank]

    def state(self) -> dict[str, Any]:
        """Where the sampler stands, as JSON can hold it."""
        return {"rows": self.taken, "datasets": [track.saved() for track in self._tracks]}

    def coming(self, ahead: int) -> list[ShardPosition]:
        """The shards that are open, and the next `ahead` of each dataset."""
        return [position for track in self._tracks for position in track.coming(ahead)]


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
        """Shards in turn: position, number, and the rows that it has given."""

    def step(self) -> RowPosition:
        fruitless = 0
        while True:
            if not self._open:
                # An epoch that gave nothing is followed by one that gives nothing.
                if fruitless >= self._shards:
                    raise DataError(
                        f"No usable row came from any of the {self._shards} shards of dataset {self._number}."
                    )
                self._epoch, self._next = self._epoch + 1, 0
                for _ in range(min(self._order.open_shards, self._shards)):
                    self._open.append(self._opened())
            position, shard, given = self._open[0]
            count = self._count(position)
            if given < count:
                self._open.popleft()
                self._open.append((position, shard, given + 1))
                return RowPosition(*position, shard, self._order.row(position, shard, given, count))
            fruitless = 0 if given else fruitless + 1
            self._open.popleft()
            if self._next < self._shards:
                self._open.appendleft(self._opened())

    def _opened(self) -> tuple[ShardPosition, int, int]:
        position = ShardPosition(self._number, self._epoch, self._next)
        self._next += 1
        return position, self._order.shard(position), 0

    def coming(self, ahead: int) -> list[ShardPosition]:
        found = [position for position, _, _ in self._open]
        position = ShardPosition(self._number, self._epoch, self._next - 1)
        for _ in range(ahead):
            position = self._order.after(position)
            found.append(position)
        return found

    def saved(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "next": self._next,
            "open": [[position.ordinal, given] for position, _, given in self._open],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._epoch, self._next = int(saved["epoch"]), int(saved["next"])
        self._open.clear()
        for ordinal, given in saved["open"]:
            position = ShardPosition(self._number, self._epoch, int(ordinal))
            self._open.append((position, self._order.shard(position), int(given)))
