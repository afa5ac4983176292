"""A sweep's log becomes a table where there is a terminal, and lines where there is none."""

from __future__ import annotations

import io

from rich.console import Console

from tandem.cli.sweep import SweepView, trials_table
from tandem.jobs.sweep import SweepPlan
from tandem.observability import codec, events

PLAN = SweepPlan(
    name="m",
    metric="mfu",
    parallel=2,
    register=True,
    compared=(),
    trials=({"optimizer.learning_rate": "1e-3", "seed": "1"}, {"optimizer.learning_rate": "3e-3", "seed": "2"}),
    jobs=("m-1", "m-2"),
)


def trial(number: int, state: str, **numbers: float) -> str:
    return codec.encode({"event": "trial", "trial": number, "job": f"m-{number}", "state": state, **numbers})


def shown(*lines: str, terminal: bool = False, raw: bool = False) -> tuple[str, SweepView]:
    out = io.StringIO()
    with SweepView(Console(file=out, width=80, force_terminal=terminal, color_system=None), PLAN, raw=raw) as view:
        for line in lines:
            view.show(line)
    return out.getvalue(), view


def test_a_line_is_said_when_a_trial_begins_or_ends_and_not_at_each_report():
    text, view = shown(
        codec.encode({"event": "sweeping", "trials": 2, "parallel": 1}),
        trial(1, "pending"),
        trial(1, "running", loss=3.0),
        trial(1, "running", loss=2.0),
        trial(1, "finished", loss=1.5),
        "some noise",
        trial(2, "failed"),
    )
    assert [line.split("·")[1].strip() for line in text.splitlines()] == [
        "1 of 2 at once",
        "trial 1 (optimizer.learning_rate=1e-3 seed=1) running, loss 3.000",
        "trial 1 (optimizer.learning_rate=1e-3 seed=1) finished, loss 1.500",
        "trial 2 (optimizer.learning_rate=3e-3 seed=2) failed",
    ]
    assert view.other_lines == ["some noise"]


def test_the_table_has_a_row_for_each_trial_and_marks_the_best():
    out = io.StringIO()
    numbers = {"step": 5.0, "steps": 10.0, "loss": 1.23456, "tokens_per_s": 9876.5, "mfu": 0.25}
    reports = {1: events.TrialReported(trial=1, state="finished", numbers=numbers)}
    Console(file=out, width=80).print(trials_table(PLAN, reports, best=1))
    head, first, second = (line.split() for line in out.getvalue().splitlines())
    assert head == ["trial", "learning_rate", "seed", "state", "step", "loss", "tok/s", "mfu"]
    assert first == ["★", "1", "1e-3", "1", "finished", "5/10", "1.2346", "9,876", "0.2500"]
    assert second == ["2", "3e-3", "2", "waiting"]


def test_a_terminal_shows_the_table_as_it_grows():
    text, _ = shown(trial(2, "running", loss=2.5), trial(2, "finished", loss=1.5), terminal=True)
    assert "waiting" in text
    assert "running" in text and "2.5000" in text
    assert "finished" in text and "1.5000" in text


def test_raw_prints_the_log():
    text, _ = shown(trial(1, "running"), "noise", raw=True)
    assert text.startswith("@tandem ") and text.endswith("noise\n")
