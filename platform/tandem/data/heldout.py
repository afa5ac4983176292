"""Held-out evaluation rows: from shards excluded from training, or from another dataset; the same rows every time."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np

from tandem.data.index import DatasetIndex, Part
from tandem.data.packing import Rows
from tandem.data.shards import samples_in
from tandem.data.spec import PackSpec, read_shard
from tandem.data.tar import READ_ERRORS
from tandem.errors import DataError
from tandem.storage import Location

SPREAD = 4
"""Rows are picked evenly from this many times as many, so that they do not all come from one position."""


def hold_out(index: DatasetIndex, share: float, location: Location) -> tuple[DatasetIndex, DatasetIndex]:
    """Split the dataset at `location` into a training part and `share` of its shards to evaluate on, spread evenly over it.

    At least one shard on each side; DataError if there is only one.
    """
    total = len(index.shards)
    if total < 2:
        raise DataError(
            f"{location} has {total} shard, so none can be held out for evaluation. Name another dataset in evaluation.data, "
            "or add data."
        )
    count = min(total - 1, max(1, round(share * total)))
    held_out_shards = {int((number + 0.5) * total / count) for number in range(count)}
    return _select_shards(index, set(range(total)) - held_out_shards), _select_shards(index, held_out_shards)


def hold_out_of_each(parts: tuple[Part, ...], share: float) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """`hold_out` of every part of a mixture: the training parts, and the held-out parts."""
    splits = [(part, *hold_out(part.index, share, part.location)) for part in parts]
    training, held_out = ([replace(part, index=pieces[side]) for part, *pieces in splits] for side in (0, 1))
    return tuple(training), tuple(held_out)


def rows_of_each(parts: tuple[Part, ...], spec: PackSpec, count: int) -> Rows:
    """`evaluation_rows` of all parts, `count` together, in proportion to their weights, at least one of each."""
    total = sum(part.weight for part in parts)
    counts = [max(1, round(count * part.weight / total)) for part in parts]
    parts_and_counts = zip(parts, counts, strict=True)
    return np.concatenate(
        [evaluation_rows(part.location, part.index, spec, rows_of_part) for part, rows_of_part in parts_and_counts]
    )


def evaluation_rows(location: Location, index: DatasetIndex, spec: PackSpec, count: int) -> Rows:
    """`count` packed rows of the dataset at `location`, or all if it has fewer. DataError if it has none with loss."""
    spec = replace(spec, kind=index.kind)
    packed: list[Rows] = []
    for path in index.shard_paths(location):
        try:
            packed.append(spec.rows(samples_in(io.BytesIO(read_shard(path)))))
        except (*READ_ERRORS, ValueError, KeyError) as error:
            raise DataError(f"{path} cannot be read: {error}. Build the dataset again: `tandem data build`.") from error
        if sum(map(len, packed)) >= SPREAD * count:
            break
    rows = np.concatenate(packed)
    if not len(rows):
        raise DataError(
            f"The {len(index.shards)} shards of {location} to evaluate on hold no row with loss within {spec.length} tokens. "
            "Raise evaluation.held_out or data.sequence_length, or name another dataset in evaluation.data."
        )
    return rows if len(rows) <= count else rows[np.linspace(0, len(rows) - 1, count).astype(int)]


def _select_shards(index: DatasetIndex, numbers: set[int]) -> DatasetIndex:
    shards = tuple(shard for number, shard in enumerate(index.shards) if number in numbers)
    return replace(index, shards=shards, samples=sum(shard.samples for shard in shards))
