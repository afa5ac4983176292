"""Error formats of each API: HTTP status, JSON body, and the event in the middle of a stream.

Dialect
├── OpenAI        {"error": {"message", "type", "param", "code"}}, in a stream as one more `data:`
│   └── Responses the same; in a stream an event of the type `error`
└── Anthropic     {"type": "error", "error": {"type", "message"}, "request_id"}, in a stream as `event: error`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Protocol

from pydantic_core import from_json

ExplainError = Callable[[str, str | None], str]
"""Rewrites an engine's error message for clients, given the model's name."""


class Dialect(Protocol):
    """Error format of one API. Statuses are given as in OpenAI's API."""

    error_prefix: bytes | None
    """Start of an event by which an engine reports an error in a stream; None: engines do not."""

    def status(self, status: int) -> int:
        """This API's HTTP status for one of OpenAI's."""
        ...

    def error(self, status: int, message: str, *, code: str | None, param: str | None, request: str) -> dict[str, Any]:
        """The JSON body; `request` is the request's id."""
        ...

    def event(self, status: int, message: str, *, code: str | None, request: str, last: bytes) -> bytes:
        """The event that ends a stream; `last` is the chunk sent before it."""
        ...


class OpenAI:
    """OpenAI's completions, and all routes with the same error format: embeddings, scores, tokens."""

    error_prefix: bytes | None = b'data: {"error":'

    def status(self, status: int) -> int:
        """Unchanged."""
        return status

    def error(self, status: int, message: str, *, code: str | None, param: str | None, request: str) -> dict[str, Any]:
        """An `error` object."""
        return {"error": {"message": message, "type": _openai_type(status), "param": param, "code": code}}

    def event(self, status: int, message: str, *, code: str | None, request: str, last: bytes) -> bytes:
        """The body as one more chunk, which the SDK raises as APIError."""
        return b"data: " + _to_json(self.error(status, message, code=code, param=None, request=request)) + b"\n\n"


class Responses(OpenAI):
    """OpenAI's responses, whose streams are typed and numbered events."""

    error_prefix: bytes | None = None

    def event(self, status: int, message: str, *, code: str | None, request: str, last: bytes) -> bytes:
        """An event of the type `error`, with its fields beside an `error` object: the documented form, and the one SDKs raise."""
        sequence_numbers = re.findall(rb'"sequence_number": ?(\d+)', last)
        body = self.error(status, message, code=code, param=None, request=request)
        event = {
            "type": "error",
            "sequence_number": int(sequence_numbers[-1]) + 1 if sequence_numbers else 0,
            "code": code or body["error"]["type"],
            "message": message,
            "param": None,
            **body,
        }
        return b"event: error\ndata: " + _to_json(event) + b"\n\n"


class Anthropic:
    """Anthropic's messages."""

    error_prefix: bytes | None = b"event: error\n"

    def status(self, status: int) -> int:
        """529 where OpenAI's API says 503: overloaded, try again."""
        return 529 if status == 503 else status

    def error(self, status: int, message: str, *, code: str | None, param: str | None, request: str) -> dict[str, Any]:
        """An object of the type `error`."""
        error = {"type": _anthropic_type(self.status(status)), "message": message}
        return {"type": "error", "error": error, "request_id": request}

    def event(self, status: int, message: str, *, code: str | None, request: str, last: bytes) -> bytes:
        """`event: error`, which the SDK raises as APIStatusError."""
        body = self.error(status, message, code=code, param=None, request=request)
        return b"event: error\ndata: " + _to_json(body) + b"\n\n"


OPENAI, RESPONSES, ANTHROPIC = OpenAI(), Responses(), Anthropic()


def dialect_of(path: str) -> Dialect:
    """The dialect of a path, whether or not such a route exists."""
    for prefix, dialect in (("/v1/messages", ANTHROPIC), ("/v1/responses", RESPONSES)):
        if path == prefix or path.startswith(prefix + "/"):
            return dialect
    return OPENAI


def rewrite_errors(chunk: bytes, dialect: Dialect, request: str, explain: ExplainError) -> bytes:
    """A chunk of an engine's stream, with errors of the engine rewritten in the API's format; `request`: the request's id.

    An error event that is split over two chunks passes unchanged.
    """
    error_prefix = dialect.error_prefix
    # Generated text cannot contain the prefix: in JSON its quotes and line ends are escaped.
    if error_prefix is None or error_prefix not in chunk:
        return chunk
    return b"\n\n".join(_rewrite_event(event, dialect, request, explain) for event in chunk.split(b"\n\n"))


def _rewrite_event(event: bytes, dialect: Dialect, request: str, explain: ExplainError) -> bytes:
    try:
        error = from_json(event.partition(b"data: ")[2])["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        return event
    status = code if isinstance(code, int) and code >= 400 else 500
    return dialect.event(status, explain(message, None), code=None, request=request, last=b"").removesuffix(b"\n\n")


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _openai_type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def _anthropic_type(status: int) -> str:
    return ANTHROPIC_TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
