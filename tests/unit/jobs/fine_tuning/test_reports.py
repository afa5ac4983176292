"""Reports, checkpoints and results of a fine-tuning job follow from the events of its training."""

from __future__ import annotations

import csv

from tandem.jobs.fine_tuning.reports import checkpoints, reports, results_csv
from tandem.observability.events import (
    CheckpointExported,
    CheckpointRegistered,
    CheckpointSaved,
    Evaluated,
    Event,
    FineTuningPlanned,
    Finished,
    Restarted,
    Started,
    Step,
)

EVENTS: list[Event] = [
    FineTuningPlanned(time=1.0, examples=20, steps=4, n_epochs=2, batch_size=10, learning_rate_multiplier=1.0),
    Started(time=2.0, steps=4),
    Step(time=3.0, step=1, steps=4, loss=2.5),
    Step(time=4.0, step=2, steps=4, loss=2.0),
    Evaluated(time=5.0, step=2, measured={"loss": 2.25}),
    CheckpointSaved(time=6.0, step=2),
    CheckpointExported(time=7.0, step=2, path="x", loss=2.0, evaluation={"evaluation_loss": 2.25}),
    CheckpointRegistered(time=8.0, step=2, model="ft:b:t::1@1"),
    Restarted(time=9.0, reason="a worker ended"),
    CheckpointExported(time=10.0, step=2, path="x", loss=2.125),
    CheckpointRegistered(time=11.0, step=2, model="ft:b:t::1@2"),
    Finished(time=12.0, model="ft:b:t::1@3"),
]


def test_a_client_is_told_of_steps_with_metrics_and_of_what_interrupts() -> None:
    told = reports(EVENTS)
    assert [report.number for report in told] == [0, 1, 2, 3, 4, 7, 8, 10, 11]
    step = told[2]
    assert step.message == "Step 1/4: training loss=2.5000" and step.metrics["train_loss"] == 2.5
    assert [report.level for report in told if report.level != "info"] == ["warn"]
    assert told[-1].message == "New fine-tuned model created: ft:b:t::1@3"


def test_numbers_go_on_where_only_later_events_are_read() -> None:
    assert reports(EVENTS[6:], first=6) == [report for report in reports(EVENTS) if report.number >= 6]


def test_a_checkpoint_that_was_computed_again_is_the_newer_version() -> None:
    (checkpoint,) = checkpoints(EVENTS)
    assert (checkpoint.step, checkpoint.model, checkpoint.train_loss) == (2, "ft:b:t::1@2", 2.125)
    (first,) = checkpoints(EVENTS[:8])
    assert (first.model, first.valid_loss) == ("ft:b:t::1@1", 2.25)


def test_the_results_file_has_a_line_for_each_step() -> None:
    rows = list(csv.DictReader(results_csv(EVENTS).splitlines()))
    assert rows == [
        {"step": "1", "train_loss": "2.5", "full_valid_loss": ""},
        {"step": "2", "train_loss": "2.0", "full_valid_loss": "2.25"},
    ]
