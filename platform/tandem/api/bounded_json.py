"""Bounded parsing of JSON bodies: values are counted before any is made, so that a body cannot block the event loop.

A parser takes 40 ns for a number, 200 ns for an object and 400 ns for a key, and lets nothing else of the process run meanwhile:
2 MiB of `{},` would stop all streams for a tenth of a second. Text costs next to nothing, whatever is in it.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

MAX_CONTAINERS = 20_000
"""Objects and lists together."""
MAX_ITEMS = 250_000
"""Values in them: a prompt of 131,072 token ids, and as many for a second one."""
MAX_TEXTS = 25_000
"""Texts, keys of objects included."""


class InvalidJsonError(ValueError):
    """A body that is not JSON, or not an object; the message has none of its content."""


class TooManyValuesError(InvalidJsonError):
    """A body with more values than a request needs."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body."""
    check_size(body)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        # The parser's message has the position and what it expected there, and nothing of the body.
        raise InvalidJsonError(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidJsonError(f"The request body must be a JSON object; it is of type {type(value).__name__}.")
    return value


def check_size(body: bytes) -> None:
    """Raise TooManyValuesError for more objects, lists, texts or values than a request has."""
    if body.count(b'"') <= 2 * MAX_TEXTS and _fits(body):
        return
    # Text may have any number of brackets, commas and escaped quotation marks.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    texts = plain.count(b'"') // 2
    if texts > MAX_TEXTS:
        raise TooManyValuesError(f"The request body has {texts:,} texts and keys; at most {MAX_TEXTS:,} are taken.")
    structure = b"".join(plain.split(b'"')[::2])
    if not _fits(structure):
        raise TooManyValuesError(
            f"The request body has {_containers(structure):,} objects and lists with {structure.count(b','):,} values; at most "
            f"{MAX_CONTAINERS:,} and {MAX_ITEMS:,} are taken."
        )


def _fits(text: bytes) -> bool:
    return _containers(text) <= MAX_CONTAINERS and text.count(b",") <= MAX_ITEMS


def _containers(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")
