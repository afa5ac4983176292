"""Rows of a run as requests of an app's batch, and answers of the batch as lines of the run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from tandem.api.openai.batches import BatchError
from tandem.batch.input.rows import BadRowError, RowRequest
from tandem.batch.input.unit_rows import NumberedRow
from tandem.batch.output.lines import Line, answered, failed
from tandem.files.checks.batch import ROUTES
from tandem.files.checks.lines import MAX_LINE_BYTES

PREFIX = "row-"
"""Of a request's custom_id. The rows' own need not be unique."""
UNANSWERED = ("batch_cancelled", "batch_expired")
"""Codes of requests that the batch ended without; they are asked again."""


def group_of(ask: RowRequest, default_model: str) -> str:
    """Route and model of a row: rows of one group share batches. BadRowError for a route that batches of an app do not have.

    One model for each batch: one that the app does not serve fails no rows of others, and adapters are not loaded in turns.
    """
    if ask.path not in ROUTES:
        raise BadRowError(
            f"{ask.path} is no route of an app's batches: they have {', '.join(ROUTES)}. Ask it without on_app."
        )
    return f"{ask.path} {ask.model or default_model}"


def route_of_group(group: str) -> str:
    """The route of a group."""
    return group.partition(" ")[0]


def request_line(number: int, ask: RowRequest, default_model: str) -> bytes:
    """A line of a batch's input file. BadRowError if it is longer than batches take."""
    body = {**ask.body, "model": ask.model or default_model}
    line = to_json({"custom_id": f"{PREFIX}{number}", "method": "POST", "url": ask.path, "body": body}) + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise BadRowError(f"Its request has {len(line):,} bytes; batches of an app take {MAX_LINE_BYTES:,}.")
    return line


def number_of(answer: Mapping[str, Any]) -> int:
    """The number of the row that a line of an output or error file answers."""
    return int(str(answer["custom_id"]).removeprefix(PREFIX))


def line_of(row: NumberedRow, ask: RowRequest, answer: Mapping[str, Any]) -> Line | None:
    """The run's line for a row; None if the batch ended before the row was answered."""
    response = answer["response"]
    if response is None:
        error = answer["error"]
        return None if error["code"] in UNANSWERED else _failed(row, error["message"], 500)
    status, body = response["status_code"], response["body"]
    if status >= 300 or not isinstance(body, dict):
        return _failed(row, _reason(body), status)
    return answered(row.number, ask.custom_id, status, to_json(body), plain=ask.plain)


def refused_line(row: NumberedRow, error: BatchError) -> Line:
    """The run's line for a row of a batch that failed since its model cannot be used."""
    return _failed(row, error.message, 404 if error.code == "model_not_found" else 400)


def _reason(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error["message"]) if isinstance(error, dict) and error.get("message") else str(body)[:500]


def _failed(row: NumberedRow, reason: str, status: int) -> Line:
    return failed(row.number, row.where, reason, row.raw, status=status)
