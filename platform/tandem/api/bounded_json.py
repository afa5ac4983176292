"""Bounded parsing of JSON bodies: values are counted before any is made, so that a body cannot block the event loop.

A parser takes 40 ns for a number, 200 ns for an object and 400 ns for a key, and lets nothing else of the process run meanwhile:
2 MiB of `{},` would stop all streams for a tenth of a second. Text costs next to nothing, whatever is in it.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

CONTAINER, TEXT, ITEM = 5, 10, 1
"""What an object or list, a text or key, and any value cost, in units of 40 ns."""
BUDGET = 280_000
"""The most that a body may cost: a prompt of 131,072 token ids and as much again, or 25,000 texts."""
LONG_NUMBER = 20
"""Digits of a number that is refused: such numbers take ten times as long, and no field has them."""
DIGITS = bytes.maketrans(b"123456789", b"0" * 9)


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
    """Raise TooManyValuesError for a body that costs more than `BUDGET`, InvalidJsonError for one with endless numbers."""
    if cost(body, body.count(b'"') // 2) <= BUDGET and not _has_long_number(body):
        return
    # Text may have any number of brackets, commas and digits.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    texts = plain.count(b'"') // 2
    if cost(b"", texts) > BUDGET:
        raise TooManyValuesError(
            f"The request body has {texts:,} texts and keys; at most {BUDGET // TEXT:,} are taken."
        )
    structure = b"".join(plain.split(b'"')[::2])
    if (found := cost(structure, texts)) > BUDGET:
        raise TooManyValuesError(
            f"The request body has more objects, lists and values than a request needs: {structure.count(b',') + 1:,} values, "
            f"{texts:,} texts and {_containers(structure):,} objects and lists, {found / BUDGET:.1f} times what is taken."
        )
    if _has_long_number(structure):
        raise InvalidJsonError(f"The request body has a number of {LONG_NUMBER} or more digits.")


def cost(text: bytes, texts: int) -> int:
    """What it costs to parse `text` with so many texts in it."""
    return ITEM * text.count(b",") + CONTAINER * _containers(text) + TEXT * texts


def _containers(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")


def _has_long_number(text: bytes) -> bool:
    return b"0" * LONG_NUMBER in text.translate(DIGITS)
