"""Values of JSON, named and tested as the checks of requests need them. Pure."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

INT_MIN, INT_MAX = -(2**63), 2**64 - 1
"""Integers that vLLM's processes can send each other (msgpack)."""
MAX_SHOWN = 60
"""Characters of a value that a message repeats."""


class Problem(NamedTuple):
    """A field of a request that has a wrong value."""

    field: str
    """Its path: `messages.0.content`."""
    text: str
    """The problem, without the field's name and the full stop."""

    def __str__(self) -> str:
        return f"`{self.field}` {self.text}."


def kind(value: Any) -> str:
    """JSON's name of a value's type, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return {"str": "text", "list": "an array", "dict": "an object"}.get(type(value).__name__, "of another type")


def format_value(value: Any) -> str:
    """A value in a message: short ones as they are, others by their type."""
    if isinstance(value, int) and abs(value) > 10**MAX_SHOWN:
        return "a number of more than 60 digits"
    if isinstance(value, dict | list):
        return kind(value)
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{repr(value[:MAX_SHOWN])[:MAX_SHOWN]} ..."
    text = (
        "null" if value is None else {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    )
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."


def is_number(value: Any) -> bool:
    """Whether it is a finite number, or text that is one."""
    if not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, or text that is one."""
    if isinstance(value, int):
        return True
    return is_number(value) and float(value).is_integer()
