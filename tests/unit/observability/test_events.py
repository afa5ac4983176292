"""Events survive their JSON lines in logs and files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.observability import codec, events
from tandem.observability.codec import from_json, read_events, to_json
from tandem.observability.events import (
    Evaluated,
    Event,
    Finished,
    Resized,
    RolledBack,
    Started,
    Step,
    SweepFinished,
    TrialReported,
)
from tandem.observability.journal import Journal

values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
fields = st.dictionaries(st.text().filter(lambda key: key != "event"), values, max_size=5)


@given(st.text(), fields)
def test_a_log_line_preserves_the_event(kind, rest):
    event = {"event": kind, **rest}
    line = codec.encode(event)
    assert len(line.splitlines()) == 1
    decoded = codec.decode(line)
    assert decoded is not None
    assert event.items() <= decoded.items()


def test_an_event_is_stamped_unless_it_has_a_time():
    assert abs(codec.decode(codec.encode({"event": "step"}))["time"] - time.time()) < 60
    assert codec.decode(codec.encode({"event": "step", "time": 5.0}))["time"] == 5.0


def test_an_event_is_found_after_the_prefix_of_a_log_line():
    line = "\x1b[36m(TrainWorker pid=12)\x1b[0m " + codec.encode({"event": "step", "step": 3})
    assert codec.decode(line)["step"] == 3


@pytest.mark.parametrize("line", ["", "hello", "@tandem", "@tandem {", "@tandem [1]", '@tandem {"no": 1}', "@tandem 5"])
def test_other_log_lines_are_ignored(line):
    assert codec.decode(line) is None


def test_a_half_written_last_line_is_ignored(tmp_path):
    path = tmp_path / "events.jsonl"
    first, second = {"event": "started", "job": "é"}, {"event": "step", "step": 1}
    path.write_text(f"{json.dumps(first)}\n\nnot json\n[1]\n{json.dumps(second)}\n" + json.dumps(second)[:9])
    assert list(codec.read(path)) == [first, second]


def test_a_missing_file_has_no_events(tmp_path):
    assert list(codec.read(tmp_path / "none")) == []


@pytest.mark.parametrize(
    ("event", "values"),
    [
        (Step(step=3, steps=9, loss=2.5, metrics={"loss_scale": 8.0}), {"event": "step", "step": 3, "loss": 2.5}),
        (
            Evaluated(step=3, rows=8, measured={"loss": 2.0, "perplexity": 7.4}),
            {"event": "evaluation", "step": 3, "rows": 8, "averaged": False, "loss": 2.0, "perplexity": 7.4},
        ),
        (RolledBack(from_step=9, step=5, rows=(40, 72)), {"event": "rollback", "from": 9, "rows": [40, 72]}),
        (Resized(from_workers=4, to_workers=2, layout="ddp"), {"event": "resized", "from": 4, "to": 2}),
        (
            TrialReported(trial=1, numbers={"step": 3, "mfu": 0.5}),
            {"event": "trial", "trial": 1, "step": 3, "mfu": 0.5},
        ),
        (SweepFinished(best=2, scores=(None, 1.5)), {"event": "swept", "best": 2, "scores": [None, 1.5]}),
        (Started(job="a", time=5.0), {"event": "started", "time": 5.0, "resumed_from": None}),
    ],
)
def test_an_event_has_the_json_keys_of_earlier_releases_and_is_read_back(event: Event, values: dict[str, object]):
    written = to_json(event)
    assert values.items() <= written.items()
    assert from_json(json.loads(json.dumps(written))) == event


def test_defaults_that_say_nothing_are_not_written():
    assert "dora" not in to_json(Finished(model="a@1")) and to_json(Finished(dora=True))["dora"] is True
    assert "error" not in to_json(TrialReported(trial=1))


def test_an_older_event_gets_defaults_and_unknown_fields_are_ignored():
    assert from_json({"event": "started"}) == Started()
    assert from_json({"event": "step", "step": 3, "colour": "red"}) == Step(step=3)


@pytest.mark.parametrize("values", [{"event": "unheard of"}, {"event": "step"}, {}])
def test_unknown_events_and_events_without_a_required_field_are_not_read(values: dict[str, object]):
    assert from_json(values) is None


def test_a_journal_stamps_events_and_reads_them_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    journal = Journal(tmp_path / "events.jsonl")
    journal.write(Step(step=1, loss=2.0))
    journal.notice("hello")
    step, notice = journal.read()
    assert isinstance(step, Step) and (step.step, step.loss) == (1, 2.0)
    assert step.time is not None and abs(step.time - time.time()) < 60
    assert list(read_events(journal.path)) == [step, notice]
    printed = [codec.decode(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in printed if line] == ["step", "notice"]


def test_every_kind_of_event_has_its_own_name():
    kinds = [
        kind
        for kind in vars(events).values()
        if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
    ]
    names = [kind.name for kind in kinds]
    assert len(set(names)) == len(names)
