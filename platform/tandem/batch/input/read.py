"""Ray Data source of a batch run: read tasks that pass through a file once and yield a table for each unfinished chunk.

A table has one row: Ray Data puts tables together and cuts them between rows as it likes, and a unit stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from tandem.batch.input.plan import WorkUnit, read_together
from tandem.batch.input.sources import only_forward
from tandem.batch.input.unit_rows import rows_of_units
from tandem.batch.work import WorkerContext
from tandem.storage import Location

COLUMNS = pa.schema(
    {
        "unit": pa.string(),
        "row": pa.list_(pa.int64()),
        "where": pa.list_(pa.string()),
        "raw": pa.list_(pa.large_binary()),
    }
)
"""The name of the unit; of each of its rows the number, the place for a person, the JSON."""


class ChunkSource(Datasource):
    """Chunks of an input, each with the rows of one base, as a Ray Data source."""

    def __init__(self, files: Sequence[Location], units: Sequence[WorkUnit], work: WorkerContext) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._files = files
        self.tasks = read_together(units, lambda source: only_forward(files[source]))
        """The units that each task reads."""
        # Once for all tasks: it holds every adapter that rows name.
        self._work = ray.put(work)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Ray Data is told how many tasks there are instead."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """As many as there are, whatever the `parallelism`."""
        return [
            ReadTask(
                partial(read, self._files[units[0].chunk.source], units, self._work),
                BlockMetadata(len(units), None, None, None),
            )
            for units in self.tasks
        ]


def read(file: Location, units: Sequence[WorkUnit], reference: Any) -> Iterator[Any]:
    """A table for each unit, in their order; `reference` is that of a WorkerContext."""
    work: WorkerContext = ray.get(reference)
    for unit, rows in rows_of_units(file, units, work.is_for_me):
        columns = [
            [unit.name],
            [[row.number for row in rows]],
            [[row.where for row in rows]],
            [[row.raw for row in rows]],
        ]
        yield pa.table(columns, schema=COLUMNS)
