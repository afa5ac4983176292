"""Rows of a run as requests of an app's batch, and answers of the batch as lines of the run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from tandem.batch.input.rows import BadRowError, RowRequest
from tandem.batch.input.unit_rows import NumberedRow
from tandem.batch.output.lines import Line, answered, failed
from tandem.files.checks.batch import ROUTES
from tandem.files.checks.lines import MAX_LINE_BYTES

PREFIX = "row-"
"""Of a request's custom_id. The rows' own need not be unique."""
UNANSWERED = ("batch_cancelled", "batch_expired")
"""Codes of requests that the batch ended without; they are asked again."""


def route_of(ask: RowRequest) -> str:
    """The route of a row; BadRowError for one that batches of an app do not have."""
    if ask.path not in ROUTES:
        raise BadRowError(
            f"{ask.path} is no route of an app's batches: they have {', '.join(ROUTES)}. Ask it without on_app."
        )
    return ask.path


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


def _reason(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error["message"]) if isinstance(error, dict) and error.get("message") else str(body)[:500]


def _failed(row: NumberedRow, reason: str, status: int) -> Line:
    return failed(row.number, row.where, reason, row.raw, status=status)
