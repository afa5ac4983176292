"""Preparation of a batch run on an app: rows are grouped by route and model."""

from __future__ import annotations

from collections.abc import Callable

from tandem.batch.app.api import BatchApi
from tandem.batch.app.lines import group_of, request_line
from tandem.batch.input.plan import MOST_BYTES, ChunkSize, chunk_size
from tandem.batch.input.rows import RowRequest
from tandem.batch.input.survey import Grouping, input_bytes
from tandem.batch.prepare import PreparedRun, check_files
from tandem.config import BatchConfig
from tandem.errors import ConfigError
from tandem.files.checks.batch import MAX_REQUESTS


def prepare_on_app(config: BatchConfig, api: BatchApi, tell: Callable[[int], None] = lambda rows: None) -> PreparedRun:
    """Read the input and compare the run with what is in its output; `tell` hears how many rows have been read.

    Names of models are the app's: only that of the run is looked up before. Raises ConfigError, DataError, StorageError or
    UnknownModelError with the next step.
    """
    if config.rows_per_piece is not None and config.rows_per_piece > MAX_REQUESTS:
        raise ConfigError(f"rows_per_piece is {config.rows_per_piece:,}; with on_app it is at most {MAX_REQUESTS:,}.")
    checked = check_files(config)
    if checked.before is None or not checked.before.finished:
        api.check_model(config.model)

    def line_bytes(ask: RowRequest) -> int:
        return len(request_line(0, ask, config.model))

    size = chunk_size(input_bytes(checked.files))
    rows = config.rows_per_piece or min(size.rows, MAX_REQUESTS)
    # Also where the number of rows is given: a unit has to fit into one batch.
    chunks = ChunkSize(rows, MOST_BYTES if config.rows_per_piece else size.bytes)
    survey = checked.survey(Grouping(lambda ask: group_of(ask, config.model), line_bytes), chunks, tell)
    manifest, survey = checked.check(survey, {})
    if checked.before is None:
        checked.output.make()
    return PreparedRun(config=checked.config, output=checked.output, manifest=manifest, survey=survey)
