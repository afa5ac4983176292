"""Check of a batch's requests: one route for all, unique ids, bodies that are objects and name a model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from tandem.files.checks.lines import check_lines
from tandem.files.checks.report import Finding, Report

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_REQUESTS = 50_000
MAX_ID_CHARS = 512
MAX_MODEL_CHARS = 256
MAX_MODELS = 8
"""Models that the requests of one batch may name: each one is looked up by every gateway for as long as its requests wait."""


def check_batch(chunks: Iterable[bytes], endpoint: str | None = None) -> Report:
    """The problems of a batch's requests.

    `endpoint`: the route that all of them must name; None: any one of `ROUTES`, the same in all lines.
    """
    check = _RequestCheck(endpoint)
    report = check_lines(chunks, check.problems, max_rows=MAX_REQUESTS, what="requests")
    return dataclasses.replace(report, models=check.first_lines)


class _RequestCheck:
    """The check of one file. It remembers a digest of each id, 16 bytes, of at most `MAX_REQUESTS`."""

    def __init__(self, endpoint: str | None) -> None:
        self.first_lines: dict[str, int] = {}
        """The first line of each model that is named."""
        self._endpoint = endpoint
        self._line_of_id: dict[bytes, int] = {}

    def problems(self, line: int, request: dict[str, Any]) -> Iterator[Finding]:
        """The problems of one request."""
        yield from self._id_problems(line, request.get("custom_id"))
        if (method := request.get("method")) != "POST":
            yield _wrong(line, "method", f"`method` must be POST; it is {_shown(method)}.", "invalid_method")
        url = request.get("url")
        expected = ROUTES if self._endpoint is None else (self._endpoint,)
        if not isinstance(url, str) or url not in expected:
            rule = expected[0] if len(expected) == 1 else f"one of {', '.join(ROUTES)}"
            yield _wrong(line, "url", f"`url` must be {rule}; it is {_shown(url)}.", "invalid_url")
        elif self._endpoint is None:
            self._endpoint = url
        body = request.get("body")
        if not isinstance(body, dict):
            yield _wrong(line, "body", f"`body` must be an object; it is {_shown(body)}.", "invalid_body")
            return
        model = body.get("model")
        if not isinstance(model, str) or not model:
            yield _wrong(line, "body.model", f"`body.model` must name a model; it is {_shown(model)}.", "missing_model")
        elif len(model) > MAX_MODEL_CHARS or not model.isprintable():
            message = (
                f"`body.model` must be a printable text of at most {MAX_MODEL_CHARS} characters; it is {_shown(model)}."
            )
            yield _wrong(line, "body.model", message, "invalid_model")
        elif model not in self.first_lines and len(self.first_lines) == MAX_MODELS:
            message = (
                f"The lines before name {MAX_MODELS} models, as many as one batch may; this one names {_shown(model)}."
            )
            yield _wrong(line, "body.model", message, "too_many_models")
        else:
            self.first_lines.setdefault(model, line)

    def _id_problems(self, line: int, custom_id: object) -> Iterator[Finding]:
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
            message = f"`custom_id` must be a text of 1 to {MAX_ID_CHARS} characters; it is {_shown(custom_id)}."
            yield _wrong(line, "custom_id", message, "invalid_custom_id")
            return
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first_line = self._line_of_id.setdefault(digest, line)
        if first_line != line:
            message = f"`custom_id` {_shown(custom_id)} is that of line {first_line} too."
            yield _wrong(line, "custom_id", message, "duplicate_custom_id")


def _wrong(line: int, param: str, message: str, code: str) -> Finding:
    return Finding(code=code, message=message, line=line, param=param)


def _shown(value: object) -> str:
    """A wrong value: a short text as it is, of all else the type."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return repr(value) if len(value) <= 64 else f"a text of {len(value):,} characters"
    return f"of type {type(value).__name__}"
