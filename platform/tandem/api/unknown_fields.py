"""Unknown and misspelt fields of requests: those that no engine and no SDK knows. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from tandem.api.request_fields import REQUEST_FIELDS
from tandem.errors import did_you_mean

MAX_NAMED_FIELDS = 3
"""Unknown fields that a message names."""
MAX_NAME_CHARS = 40
"""Characters of a name that a message repeats."""


def unknown_fields(path: str, fields: Iterable[str]) -> list[str]:
    """The `fields` that are unknown at the route `path`, in their order; empty for an unknown route."""
    known_fields = REQUEST_FIELDS.get(path)
    return [] if known_fields is None else [field for field in fields if field not in known_fields]


def misspelt_fields(path: str, fields: Iterable[str]) -> list[str]:
    """The unknown fields whose names are near a known one's."""
    unknown = unknown_fields(path, fields)
    return [field for field in unknown if _nearest(path, field)]


def describe(path: str, unknown: list[str]) -> str:
    """`unknown field 'temperatur'; did you mean 'temperature'?`, in ASCII, whatever the client wrote."""
    parts = []
    for field in unknown[:MAX_NAMED_FIELDS]:
        suggestion = _nearest(path, field)
        text = f"unknown field {field[:MAX_NAME_CHARS]!a}"
        parts.append(text + (f"; {suggestion.strip()[0].lower()}{suggestion.strip()[1:]}" if suggestion else ""))
    if len(unknown) > MAX_NAMED_FIELDS:
        parts.append(f"and {len(unknown) - MAX_NAMED_FIELDS} more")
    return ", ".join(parts)


def _nearest(path: str, field: str) -> str:
    """` Did you mean 'X'?`, or an empty string for a name that is too long or like no field."""
    return _nearest_field(path, field) if len(field) <= MAX_NAME_CHARS else ""


# A comparison with all fields takes about a millisecond of the gateway's event loop; clients repeat their unknown fields.
@functools.lru_cache(maxsize=1024)
def _nearest_field(path: str, field: str) -> str:
    return did_you_mean(field, REQUEST_FIELDS[path])
