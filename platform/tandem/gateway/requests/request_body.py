"""Bodies of requests: read within limits of size and time, as JSON objects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request

from tandem.api.bounded_json import InvalidJsonError, TooManyValuesError, parse_object, size_steps
from tandem.gateway.errors import ApiError
from tandem.gateway.requests.held_bytes import HeldBody
from tandem.gateway.requests.large_bodies import LargeBodies

MAX_SHOWN_CHARS = 40
"""Characters of a header that an error shows."""


async def read_body(request: Request, limit: int, timeout_s: float, held_body: HeldBody | None = None) -> bytes:
    """The request's body, counted in `held_body`.

    ApiError 415 unless it is plain JSON, 413 as soon as it exceeds `limit` bytes, 408 if it is not whole within `timeout_s`, 503
    if the gateway may hold no more bytes.
    """
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415,
            f"The request body is compressed (Content-Encoding: {encoding[:MAX_SHOWN_CHARS]!a}); only plain bodies are taken.",
            code="unsupported_encoding",
            headers={"Accept-Encoding": "identity"},
        )
    # Of other types a web page can make a browser send anything to this machine, unasked.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise ApiError(
            415,
            f"The request has Content-Type: {media_type[:MAX_SHOWN_CHARS]!a}; send application/json." if media_type else
            "The request has no Content-Type; send application/json.",
            code="unsupported_content_type",
        )  # fmt: skip
    content_length = request.headers.get("content-length", "")
    parts, size = [], int(content_length) if content_length.isascii() and content_length.isdecimal() else 0
    if size <= limit:
        size = 0
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                if held_body is not None:
                    held_body.begin(lambda: deadline.reschedule(asyncio.get_running_loop().time()))
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        break
                    if held_body is not None:
                        held_body.grow_to(size)
        except TimeoutError:
            if held_body is not None:
                held_body.grow_to(size)  # raises where the upload made room for others
            raise ApiError(
                408,
                f"The request body was not whole after {timeout_s:g} s (gateway.upload_timeout_s).",
                code="upload_timeout",
            ) from None
        if held_body is not None:
            held_body.end()
    if size > limit:
        raise ApiError(
            413,
            f"The request body has {size if content_length else f'more than {limit}'} bytes; at most {limit} are taken"
            + (" (gateway.max_body_bytes)." if held_body is not None else " here."),
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; ApiError 400 for anything else, 413 for more values than a request needs."""
    with _as_api_errors():
        return parse_object(body)


async def parse_in_turns(body: bytes, turns: LargeBodies) -> dict[str, Any]:
    """`parse_body`, in turns with other large bodies."""
    with _as_api_errors():
        await turns.run_steps(len(body), size_steps(body))
        return await turns.run(len(body), parse_object, body, checked=True)


@contextlib.contextmanager
def _as_api_errors() -> Iterator[None]:
    try:
        yield
    except TooManyValuesError as error:
        raise ApiError(413, str(error)) from None
    except InvalidJsonError as error:
        raise ApiError(400, str(error)) from None
