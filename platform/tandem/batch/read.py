"""The input as a source of Ray Data: a read task for each piece that is left, a table of its rows for each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from tandem.batch.plan import Unit
from tandem.batch.sources import rows_of
from tandem.batch.work import Work
from tandem.storage import Location

COLUMNS = pa.schema({"unit": pa.string(), "row": pa.int64(), "where": pa.string(), "raw": pa.large_binary()})
"""The name of the unit that a row is published with, the row's number, its place for a person, its JSON."""


class Pieces(Datasource):
    """Pieces of an input, each with the rows that one base answers."""

    def __init__(self, files: Sequence[Location], units: Sequence[Unit], work: Work) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files, self._units, self._base = files, units, work.spec.id
        # Once for all tasks: it holds every adapter that rows name.
        self._work = ray.put(work)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Ray Data is told how many tasks there are instead."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """One for each piece, whatever the `parallelism`."""
        return [
            ReadTask(
                partial(read, self._files[unit.piece.source], unit, self._work),
                BlockMetadata(unit.piece.counts[self._base], None, None, None),
            )
            for unit in self._units
        ]


def read(file: Location, unit: Unit, reference: Any) -> Iterator[Any]:
    """The one table of a piece; `reference` is that of a Work."""
    work: Work = ray.get(reference)
    rows = itertools.islice(rows_of(file, unit.piece.mark), unit.piece.rows)
    mine = [(i, row) for i, row in enumerate(rows, unit.piece.first) if work.is_for_me(row)]
    columns = [
        [unit.name] * len(mine),
        [number for number, _ in mine],
        [f"{file} {row.where}" for _, row in mine],
        [row.raw for _, row in mine],
    ]
    yield pa.table(columns, schema=COLUMNS)
