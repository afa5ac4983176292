"""Which row comes when, as pure functions of the seed, so that a stopped run goes on at the very next row.

Rows have one global order, whatever the number of data-parallel ranks: rank r of W takes the rows n with n mod W = r. A data
cursor is therefore one number, the rows already taken, and it holds for any W.

- Held rows (the packed dataset fits in the object store): each epoch is a permutation of all rows.
- Streamed rows: shards are dealt to L lanes each epoch; lane n mod L gives row n. A rank reads its own L / W lanes, each in
  order, so no rank waits for another. W must divide L.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from tandem.errors import DataError

LANES = 8
Row = TypeVar("Row")


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> npt.NDArray[np.int64]:
    """The order of `count` things in an epoch."""
    if not shuffle:
        return np.arange(count)
    return np.random.default_rng((seed, epoch)).permutation(count)


_cached_order = lru_cache(maxsize=8)(epoch_order)


def held_rows(total: int, seed: int, shuffle: bool, start: int, stride: int) -> Iterator[int]:
    """Endless indices of rows start, start + stride, ... of the global order over `total` rows."""
    for n in itertools.count(start, stride):
        epoch, at = divmod(n, total)
        yield int(_cached_order(total, seed, epoch, shuffle)[at])


def lane_count(shards: int, workers: int) -> int:
    """Lanes for a new run: a multiple of `workers`, and at most one for each shard.

    Raises DataError when there are fewer shards than workers.
    """
    if shards < workers:
        raise DataError(
            f"The dataset has {shards} shards for {workers} workers; each worker needs one. "
            "Build it again with a smaller shard_bytes, or train with fewer workers."
        )
    return workers * max(1, min(LANES, shards) // workers)


@dataclass(frozen=True, slots=True)
class Lane:
    """One ordered part of a streamed dataset; it repeats for ever, dealt anew each epoch."""

    number: int
    lanes: int
    shards: int
    seed: int
    shuffle: bool

    def epoch(self, epoch: int) -> list[int]:
        """The lane's shards in an epoch, in order."""
        dealt = epoch_order(self.shards, self.seed, epoch, self.shuffle)
        return [int(shard) for shard in dealt[self.number :: self.lanes]]

    def rows(self, read: Callable[[list[int]], Iterator[Row]], skip: int) -> Iterator[Row]:
        """Endless rows from the one after `skip`; `read` gives the rows of a list of shards, in order."""
        fruitless = 0
        for epoch in itertools.count():
            seen = 0
            for row in read(self.epoch(epoch)):
                seen += 1
                if skip:
                    skip -= 1
                else:
                    yield row
            fruitless = 0 if seen else fruitless + 1
            if fruitless > 100:
                raise DataError(f"No usable row came from lane {self.number} of {self.lanes} in {fruitless} epochs.")


def lanes_of(rank: int, world: int, lanes: int) -> list[int]:
    """The lanes that a rank reads; DataError if `world` ranks cannot share `lanes` evenly."""
    if lanes % world:
        raise DataError(
            f"The run's data goes in {lanes} lanes, which {world} workers cannot share evenly. "
            f"Resume with a number of workers that divides {lanes}."
        )
    return list(range(rank, lanes, world))
