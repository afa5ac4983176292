"""Events in logs and files."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.observability import events

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
fields = st.dictionaries(st.text().filter(lambda key: key != "event"), values, max_size=5)


@given(st.text(), fields)
def test_an_event_survives_its_log_line_whatever_it_holds(kind, rest):
    event = {"event": kind, **rest}
    line = events.encode(event)
    assert len(line.splitlines()) == 1
    decoded = events.decode(line)
    assert decoded is not None
    assert event.items() <= decoded.items()


def test_an_event_is_stamped_unless_it_has_a_time():
    assert abs(events.decode(events.encode({"event": "step"}))["time"] - time.time()) < 60
    assert events.decode(events.encode({"event": "step", "time": 5.0}))["time"] == 5.0


def test_an_event_is_found_behind_what_a_log_puts_before_it():
    line = "\x1b[36m(TrainWorker pid=12)\x1b[0m " + events.encode({"event": "step", "step": 3})
    assert events.decode(line)["step"] == 3


@pytest.mark.parametrize("line", ["", "hello", "@tandem", "@tandem {", "@tandem [1]", '@tandem {"no": 1}', "@tandem 5"])
def test_other_lines_are_no_events(line):
    assert events.decode(line) is None


def test_a_file_gives_its_events_without_a_half_written_last_line(tmp_path):
    path = tmp_path / "events.jsonl"
    first, second = {"event": "started", "job": "é"}, {"event": "step", "step": 1}
    path.write_text(f"{json.dumps(first)}\n\nnot json\n[1]\n{json.dumps(second)}\n" + json.dumps(second)[:9])
    assert list(events.read(path)) == [first, second]


def test_a_file_that_is_not_there_has_no_events(tmp_path):
    assert list(events.read(tmp_path / "none")) == []
