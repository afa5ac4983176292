"""End of a batch run: its two files are made of the published chunks, and the manifest says so."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from tandem.batch.output.manifest import Manifest
from tandem.batch.prepare import PreparedRun
from tandem.batch.progress import Summary
from tandem.errors import EngineError, StorageError


def finished(run: PreparedRun) -> Summary | None:
    """How the run ended, if it is done."""
    manifest = Manifest.read(run.output)
    if manifest is None or not manifest.finished:
        return None
    run.output.clean()
    return _summary(replace(run, manifest=manifest), found=run.survey.rows)


def finish(run: PreparedRun, *, found: int, began: float) -> Summary:
    """Make the two files of a run whose units are all published.

    `found`: rows that an earlier start had published; `began`: monotonic time at which this one did. Raises StorageError if a
    chunk cannot be read.
    """
    output, rows = run.output, run.survey.rows
    if (whole := finished(run)) is not None:
        # Another command was at it too, and was done first.
        return whole
    assembling = time.monotonic()
    try:
        answered, failed = output.assemble(run.survey.chunks, run.units)
    except (FileNotFoundError, StorageError) as error:
        if (whole := finished(run)) is not None:
            return whole
        raise StorageError(
            f"The two files cannot be made of {output.run}: {error}. The same command resumes."
        ) from error
    if answered + failed != rows:
        raise EngineError(
            f"{answered} answers and {failed} errors were published of {rows} rows. Look at {output.run}, and report it."
        )
    manifest = replace(run.manifest, finished=True, answered=answered, failed=failed)
    output.finish(manifest.plain())
    now = time.monotonic()
    return replace(
        _summary(replace(run, manifest=manifest), found=found), seconds=now - began, files_s=now - assembling
    )


def rows_in(run: PreparedRun, published: Collection[str]) -> int:
    """How many rows the units with these names have."""
    done = (unit for unit in run.units if unit.name in published)
    return sum(unit.chunk.counts[run.survey.bases[unit.base]] for unit in done)


def _summary(run: PreparedRun, *, found: int) -> Summary:
    return Summary(
        rows=run.survey.rows,
        answered=run.manifest.answered,
        failed=run.manifest.failed,
        found=found,
        results=str(run.output.results),
        errors=str(run.output.errors),
    )
