"""Order of a job's events from two logs that grow: each is told once, whatever the pages and the times are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import JobError
from tandem.jobs.tracking.positions import BEGINNING, Position, merge
from tandem.jobs.work.records import NumberedEvent
from tandem.observability.events import Notice

TIMES = st.lists(st.floats(0, 100), max_size=12)


def log_of(name: str, times: list[float]) -> list[NumberedEvent]:
    return [NumberedEvent(number, Notice(time=at, message=f"{name}{number}")) for number, at in enumerate(times, 1)]


def messages(events: list[NumberedEvent]) -> list[str]:
    return [event.message for _, event in events if isinstance(event, Notice)]


@given(TIMES, TIMES, st.integers(1, 5), st.data())
def test_every_event_is_told_once_in_the_order_of_its_log_while_both_logs_grow(
    state_times: list[float], line_times: list[float], limit: int, data: st.DataObject
) -> None:
    states, lines = log_of("s", state_times), log_of("l", line_times)
    told: list[str] = []
    position, known_states, known_lines = BEGINNING, 0, 0
    while True:
        known_states = data.draw(st.integers(known_states, len(states)))
        known_lines = data.draw(st.integers(known_lines, len(lines)))
        # What a reader does: the next ones after a position, of those that are written by now.
        placed = merge(
            Position.of(position.id),
            states[position.states : known_states][:limit],
            lines[position.lines : known_lines][:limit],
            limit,
        )
        assert len(placed) <= limit
        told += [each.event.message for each in placed if isinstance(each.event, Notice)]
        position = placed[-1].position if placed else position
        if position == (len(states), len(lines)):
            break
        if not placed:
            known_states, known_lines = len(states), len(lines)
    assert [each for each in told if each[0] == "s"] == messages(states)
    assert [each for each in told if each[0] == "l"] == messages(lines)


def test_events_of_both_logs_are_told_by_their_times() -> None:
    placed = merge(BEGINNING, log_of("s", [1, 4]), log_of("l", [2, 3]), 10)
    assert [each.position.id for each in placed] == ["1.0", "1.1", "1.2", "2.2"]


@pytest.mark.parametrize("text", ["", "x", "-1", "1.", "1.2.3", "9" * 40, "1.x", "\u0661"])
def test_a_text_that_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="must be the id of an event"):
        Position.of(text)
