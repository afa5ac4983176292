"""Rows of chosen units of a file, which is passed through once."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tandem.batch.input.plan import WorkUnit
from tandem.batch.input.sources import Row, only_forward, rows_of
from tandem.storage import Location


class NumberedRow(NamedTuple):
    """A row of a unit."""

    number: int
    """Its place in the input."""
    where: str
    """For a person: the file, and the place in it."""
    raw: bytes


def rows_of_units(
    file: Location, units: Iterable[WorkUnit], is_mine: Callable[[Row], bool]
) -> Iterator[tuple[WorkUnit, list[NumberedRow]]]:
    """The rows of each unit for which `is_mine` holds; `units`: of this file, in the order of their chunks."""
    rows, at = iter(list[Row]()), -1
    for unit in units:
        chunk = unit.chunk
        if at < 0 or (chunk.first != at and not only_forward(file)):
            rows = rows_of(file, chunk.position)
        else:
            # Chunks in between are not asked for.
            collections.deque(itertools.islice(rows, chunk.first - at), maxlen=0)
        here = enumerate(itertools.islice(rows, chunk.rows), chunk.first)
        at = chunk.first + chunk.rows
        yield unit, [NumberedRow(number, f"{file} {row.where}", row.raw) for number, row in here if is_mine(row)]
