"""Bounded parsing of JSON bodies: values are counted before any is made, so that a body cannot block the event loop.

A parser takes 40 ns for a number, 200 ns for an object and 400 ns for a key, and lets nothing else of the process run meanwhile:
2 MiB of `{},` would stop all streams for a tenth of a second. Text costs next to nothing, whatever is in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

CONTAINER_COST, TEXT_COST, ITEM_COST = 5, 10, 1
"""Cost of an object or list, of a text or key, and of any value, in units of 40 ns."""
BUDGET = 280_000
"""The most that a body may cost: a prompt of 131,072 token ids and as much again, or 25,000 texts."""
SMALL_BYTES = BUDGET // CONTAINER_COST
"""Bytes of a body that cannot exceed the budget, 56,000: no byte costs more than one that is a container, or half of a text."""
MAX_DIGITS = 20
"""Digits of a number that is refused: such numbers take ten times as long, and no field has them."""
PIECE_BYTES = 64 * 1024
"""Bytes that are counted in one step."""
DIGITS = bytes.maketrans(b"123456789", b"0" * 9)


class InvalidJsonError(ValueError):
    """A body that is not JSON, or not an object; the message has none of its content."""


class TooManyValuesError(InvalidJsonError):
    """A body with more values than a request needs."""


def parse_object(body: bytes, *, checked: bool = False) -> dict[str, Any]:
    """The JSON object in a body; `checked`: it has passed `check_size`."""
    if not checked:
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
    for _ in size_steps(body):
        pass


def size_steps(body: bytes) -> Iterator[None]:
    """`check_size` in steps of about a millisecond at most, between which other tasks may run; raises the same errors."""
    if len(body) <= SMALL_BYTES:
        if _has_long_number(body):
            yield from _structure_steps(body)
        return
    total_cost = 0.0
    for start in range(0, len(body), PIECE_BYTES):
        # An upper bound that counts the content of texts too: nearly every body is within the budget even so.
        piece = body[max(0, start - MAX_DIGITS) : start + PIECE_BYTES]
        total_cost += cost(piece, piece.count(b'"') / 2)
        if total_cost > BUDGET or _has_long_number(piece):
            break
        yield
    else:
        return
    yield from _structure_steps(body)


def _structure_steps(body: bytes) -> Iterator[None]:
    """`size_steps` that skips the content of texts, which may have any number of brackets, commas and digits."""
    in_text, structure_cost, texts, previous_end = False, 0.0, 0.0, b""
    for piece in _pieces(body):
        unescaped = piece.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in piece else piece
        parts = unescaped.split(b'"')
        texts += (len(parts) - 1) / 2
        structure = b"".join(parts[1::2] if in_text else parts[::2])
        in_text ^= len(parts) % 2 == 0
        structure_cost += cost(structure, 0.0)
        if structure_cost + TEXT_COST * texts > BUDGET:
            raise TooManyValuesError(
                "The request body has more objects, lists, values and texts than a request needs: at most "
                f"{BUDGET // TEXT_COST:,} texts and keys, {BUDGET // CONTAINER_COST:,} objects and lists, or "
                f"{BUDGET // ITEM_COST:,} other values are taken."
            )
        if _has_long_number(previous_end + structure):
            raise InvalidJsonError(f"The request body has a number of {MAX_DIGITS} or more digits.")
        previous_end = structure[-MAX_DIGITS:]
        yield


def _pieces(body: bytes) -> Iterator[bytes]:
    """A body in pieces that split no escaped character."""
    start = 0
    while start < len(body):
        end = start + PIECE_BYTES
        piece = body[start:end]
        backslashes = len(piece) - len(piece.rstrip(b"\\"))
        if backslashes % 2:
            piece = body[start : end + 1]
        start += len(piece) or 1
        yield piece


def cost(text: bytes, texts: float) -> float:
    """Cost of parsing `text`, in which there are so many texts."""
    return ITEM_COST * text.count(b",") + CONTAINER_COST * _containers(text) + TEXT_COST * texts


def _containers(text: bytes) -> int:
    return text.count(b"{") + text.count(b"[")


def _has_long_number(text: bytes) -> bool:
    # So many digits in a row have two that are ten apart in a tenth of the bytes; most texts have no such two.
    if b"00" not in text[:: MAX_DIGITS // 2].translate(DIGITS):
        return False
    return b"0" * MAX_DIGITS in text.translate(DIGITS)
