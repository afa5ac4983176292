"""Output lines: OpenAI's batch format for `results.jsonl`, reasons for `errors.jsonl`.

A line of `errors.jsonl` holds the row as it came, so that it can be corrected and run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

NO_ROUTE = {"detail": "Not Found"}
"""What an app says of a path that it does not have."""


class Line(NamedTuple):
    """One row's line."""

    text: bytes
    failed: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0


def answered(row: int, custom_id: str | None, status: int, body: bytes, *, plain: bool) -> Line:
    """The line of a row that was answered; `body` is the engine's, untouched. Raises ValueError if it is no JSON object."""
    said = from_json(body, allow_inf_nan=False)
    if not isinstance(said, dict):
        raise ValueError(f"a {type(said).__name__}")
    usage = said.get("usage") or {}
    head: dict[str, Any] = {"row": row, "custom_id": custom_id or f"row-{row}"}
    if plain and (text := _text(said)) is not None:
        head["text"] = text
    response = {"status_code": status, "request_id": said.get("id")}
    if b"\n" in body:
        body = to_json(said)
    line = b'%b,"response":%b,"body":%b},"error":null}' % (to_json(head)[:-1], to_json(response)[:-1], body)
    return Line(line, False, int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def failed(row: int, where: str, reason: str, raw: bytes, *, custom_id: str | None = None, status: int = 400) -> Line:
    """The line of a row that was not."""
    try:
        given = from_json(raw, allow_inf_nan=False)
    except ValueError:
        given = raw.decode(errors="replace")
    if custom_id is None and isinstance(given, dict) and isinstance(given.get("custom_id"), str | int):
        custom_id = str(given["custom_id"])
    head = {"row": row, "custom_id": custom_id or f"row-{row}", "where": where}
    return Line(to_json({**head, "error": {"code": status, "message": reason}, "input": given}), True)


def reason_of(body: bytes, path: str, explain: Callable[[str, str | None], str]) -> str:
    """The reason in an engine's refusal of a request for `path`; `explain` rewrites its messages for clients."""
    try:
        said = from_json(body)
        if said == NO_ROUTE:
            return f"Its model does not answer {path}. Ask one that does: some write text, others embed or score it."
        error = said.get("error", said)
        return explain(str(error.get("message") or error), None)
    except (ValueError, AttributeError):
        return body.decode(errors="replace")[:500]


def row_of(line: bytes) -> int:
    """The number of a line's row."""
    # `row` comes first in every line that is written here.
    return int(line[7 : line.index(b",", 7)])


def has_failed(line: bytes) -> bool:
    """Whether a line is for the errors file."""
    return not line.endswith(b',"error":null}')


def _text(said: dict[str, Any]) -> str | None:
    choices = said.get("choices") or [{}]
    first = choices[0]
    return first.get("text") if "text" in first else (first.get("message") or {}).get("content")
