"""Order of a job's events: changes of its state in the database, and events of its run in the journal, as one sequence. Pure.

The two logs are written by different processes, so neither can number the other's events. An event's id names its position in
both: `STATES.LINES` says that the events before and with it are the first STATES of the database and the first LINES lines of
the journal. Whoever goes on after an id gets each event once, however the two logs grow meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tandem.errors import JobError
from tandem.jobs.work.records import NumberedEvent
from tandem.observability.events import Event


class Position(NamedTuple):
    """A place between two events of a job."""

    states: int = 0
    """Number of the newest event of the database before it."""
    lines: int = 0
    """Number of the newest line of the journal before it."""

    @property
    def id(self) -> str:
        """The id of the event that ends here."""
        return f"{self.states}.{self.lines}"

    @classmethod
    def of(cls, text: str) -> Position:
        """The position of an id; a plain number N counts changes of state. JobError for other texts."""
        found = re.fullmatch(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?", text)
        if found is None:
            raise JobError(f"`after` is {text[:40]!r}; it must be the id of an event, such as 3.120.")
        return cls(int(found[1]), int(found[2] or 0))


BEGINNING = Position()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedEvent:
    """An event and the position after it."""

    position: Position
    event: Event


def merge(
    after: Position, states: Sequence[NumberedEvent], lines: Sequence[NumberedEvent], limit: int
) -> list[PlacedEvent]:
    """The next events after a position by their times, `limit` at most, of the next ones of either log.

    Each log keeps its order, whatever its times are.
    """
    placed: list[PlacedEvent] = []
    position, first_state, first_line = after, 0, 0
    while len(placed) < limit and (first_state < len(states) or first_line < len(lines)):
        if first_line == len(lines) or (
            first_state < len(states) and _time(states[first_state]) <= _time(lines[first_line])
        ):
            number, event = states[first_state]
            position, first_state = position._replace(states=number), first_state + 1
        else:
            number, event = lines[first_line]
            position, first_line = position._replace(lines=number), first_line + 1
        placed.append(PlacedEvent(position=position, event=event))
    return placed


def _time(numbered: NumberedEvent) -> float:
    return numbered.event.time or 0.0
