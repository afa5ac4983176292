"""Input file of an app's batch: the requests of the rows of consecutive units that have no answer yet."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import IO

from tandem.batch.app.lines import group_of, request_line
from tandem.batch.input.plan import WorkUnit
from tandem.batch.input.rows import BadRowError, RowRequest, parse, read_row
from tandem.batch.input.sources import Row
from tandem.batch.input.unit_rows import NumberedRow, rows_of_units
from tandem.batch.prepare import PreparedRun
from tandem.files.checks.batch import MAX_REQUESTS

FULL_BYTES = 128 << 20
"""Bytes after which a file gets no further unit. A unit has at most 64 MiB and one more row, so that a file stays far below the
512 MiB that an app takes by default."""


class RunRows:
    """The rows of a run and their requests."""

    def __init__(self, run: PreparedRun) -> None:
        self._run = run

    def request_of(self, raw: bytes) -> RowRequest:
        """The request of a row; BadRowError if it has none."""
        config, check_values = self._run.config, self._run.manifest.checks_values
        return read_row(parse(raw), config.request, chat=config.chat, check_values=check_values)

    def of_units(self, units: Sequence[WorkUnit]) -> Iterator[tuple[WorkUnit, list[NumberedRow]]]:
        """The rows of each unit; the units are of one group, in the order of their chunks."""
        survey, model = self._run.survey, self._run.config.model
        group = survey.bases[units[0].base]

        def is_mine(row: Row) -> bool:
            if row.problem is not None:
                return False
            try:
                ask = self.request_of(row.raw)
                # A row that is refused for its length belongs to no unit.
                return group_of(ask, model) == group and bool(self.line_of(0, ask))
            except BadRowError:
                return False

        for source, of_source in itertools.groupby(units, lambda unit: unit.chunk.source):
            yield from rows_of_units(survey.files[source], list(of_source), is_mine)

    def line_of(self, number: int, ask: RowRequest) -> bytes:
        """A row's line in an input file."""
        return request_line(number, ask, self._run.config.model)


def fill(
    file: IO[bytes], rows: RunRows, units: Sequence[WorkUnit], kept: Mapping[str, Mapping[int, bytes]]
) -> tuple[WorkUnit, ...]:
    """Write the requests of `units` that are not `kept`, in their order, until the file is full; the units that are in it.

    Units of one batch are of one group.
    """
    num_rows, used = 0, list[WorkUnit]()
    same_group = list(itertools.takewhile(lambda unit: unit.base == units[0].base, units))
    for unit, unit_rows in rows.of_units(same_group):
        answered = kept.get(unit.name, {})
        asked = [row for row in unit_rows if row.number not in answered]
        if used and (num_rows + len(asked) > MAX_REQUESTS or file.tell() >= FULL_BYTES):
            break
        for row in asked:
            file.write(rows.line_of(row.number, rows.request_of(row.raw)))
        num_rows += len(asked)
        used.append(unit)
    return tuple(used)


def file_sha256(file: IO[bytes]) -> str:
    """SHA-256 of a file, which is at its start afterwards."""
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    file.seek(0)
    return found
