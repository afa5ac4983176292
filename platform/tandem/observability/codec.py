"""Codec between events and JSON lines.

An event is one JSON object a line in `events.jsonl`, {"time": ..., "event": NAME, fields...}. In a log the line follows `MARK`,
so that events can be picked out of other output. When events are read, fields that an older release did not write get their
defaults, and fields that this release does not know are ignored.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from tandem.observability.events import TYPES, Event

MARK = "@tandem "


def to_json(event: Event) -> dict[str, Any]:
    """The JSON object of an event; without `time` if it is not stamped yet."""
    values: dict[str, Any] = {"event": event.name} if event.time is None else {"time": event.time, "event": event.name}
    for f in fields(event):
        value = getattr(event, f.name)
        if f.name == "time" or (f.metadata.get("omit_default") and value == f.default):
            continue
        if f.metadata.get("spread"):
            values |= value
        else:
            values[f.metadata.get("key", f.name)] = list(value) if isinstance(value, tuple) else value
    return values


def from_json(values: Mapping[str, Any]) -> Event | None:
    """The event in a JSON object; None for a kind that this release does not know, or without a field that it needs."""
    kind = TYPES.get(str(values.get("event")))
    if kind is None:
        return None
    remaining = dict(values)
    del remaining["event"]
    schema = _schema(kind.name)
    arguments: dict[str, Any] = {}
    for name, key, required in schema.fields:
        if key in remaining:
            value = remaining.pop(key)
            arguments[name] = tuple(value) if isinstance(value, list) else value
        elif required:
            return None
    if schema.spread is not None:
        arguments[schema.spread] = remaining
    return kind(**arguments)


@dataclass(frozen=True)
class _Schema:
    """Fields of a kind of event, for decoding."""

    fields: tuple[tuple[str, str, bool], ...]
    """Name, JSON key, and whether there is no default."""
    spread: str | None


@functools.cache
def _schema(name: str) -> _Schema:
    kind = TYPES[name]
    plain = [f for f in fields(kind) if not f.metadata.get("spread")]
    spread = [f.name for f in fields(kind) if f.metadata.get("spread")]
    return _Schema(
        tuple(
            (f.name, f.metadata.get("key", f.name), f.default is MISSING and f.default_factory is MISSING)
            for f in plain
        ),
        spread[0] if spread else None,
    )


def encode(event: Event | Mapping[str, Any]) -> str:
    """The log line of an event, stamped with the time (seconds since 1970) unless it has one."""
    values = to_json(event) if isinstance(event, Event) else event
    return MARK + json.dumps({"time": round(time.time(), 3), **values})


def decode(line: str) -> dict[str, Any] | None:
    """The JSON object of the event in a log line, or None if the line holds none."""
    _, mark, content = line.partition(MARK)
    if not mark:
        return None
    try:
        event = json.loads(content)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def decode_event(line: str) -> Event | None:
    """The event in a log line; None if the line holds none, or one of a kind that this release does not know."""
    values = decode(line)
    return None if values is None else from_json(values)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of the events in a file of JSON lines; a half-written last line is left out."""
    if not path.exists():
        return
    with path.open() as file:
        yield from parse(file)


def read_events(path: Path) -> Iterator[Event]:
    """The events in a file of JSON lines, of the kinds that this release knows."""
    return (event for event in map(from_json, read(path)) if event is not None)


def parse(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of the events among JSON lines."""
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event
