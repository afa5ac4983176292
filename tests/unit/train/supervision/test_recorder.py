"""The recorder derives restarts and resizes from the starts of successive attempts."""

from __future__ import annotations

from pathlib import Path

from tandem.observability.events import Event, Notice, Resized, Restarted, Started, Step
from tandem.observability.journal import Journal
from tandem.train.reporting.metrics import Metrics
from tandem.train.supervision.recorder import EventRecorder


def recorded(tmp_path: Path, *events: Event, reason: str = "") -> list[Event]:
    journal = Journal(tmp_path / "events.jsonl")
    recorder = EventRecorder(journal, Metrics([], earlier_events=[], notice=lambda message: None))
    recorder.restart_reason = reason
    for event in events:
        recorder.record(event)
    return journal.read()


def test_the_first_start_is_recorded_as_it_is(tmp_path: Path):
    started, step = recorded(tmp_path, Started(workers=2), Step(step=1))
    assert isinstance(started, Started) and isinstance(step, Step)


def test_a_later_start_is_a_restart_with_the_repeated_steps(tmp_path: Path):
    found = recorded(
        tmp_path, Started(workers=2), Step(step=14), Started(workers=2, resumed_from=10), reason="worker 1 died"
    )
    restarted = found[-1]
    assert isinstance(restarted, Restarted) and len(found) == 3
    assert (restarted.reason, restarted.resumed_from, restarted.repeated) == ("worker 1 died", 10, 4)
    assert restarted.lost_s is not None and 0 <= restarted.lost_s < 10


def test_a_start_with_other_workers_is_a_resize_and_a_restart(tmp_path: Path):
    found = recorded(tmp_path, Started(workers=4), Started(workers=2, layout="fsdp2", resumed_from=10))
    resized, restarted = found[1:]
    assert isinstance(resized, Resized) and isinstance(restarted, Restarted)
    assert (resized.from_workers, resized.to_workers, resized.layout, resized.step) == (4, 2, "fsdp2", 10)
    assert restarted.lost_s is None, "the first attempt took no step"


def test_other_events_are_recorded_as_they_are(tmp_path: Path):
    (event,) = recorded(tmp_path, Notice(message="hello"))
    assert isinstance(event, Notice) and event.message == "hello"
