"""A job's log becomes progress that a person can read."""

from __future__ import annotations

import io

from rich.console import Console

from tandem.cli.progress import JobView
from tandem.observability import events


def shown(*lines: str, raw: bool = False) -> tuple[str, JobView]:
    out = io.StringIO()
    with JobView(Console(file=out, width=120), "job", raw=raw) as view:
        view.follow(lines)
    return out.getvalue(), view


STARTED = events.encode(
    {"event": "started", "parameters": 2_400_000, "trainable": 1000, "workers": 2, "strategy": "fsdp2", "steps": 10}
)


def step(n: int) -> str:
    return events.encode({"event": "step", "step": n, "steps": 10, "loss": 3.25, "tokens_per_s": 8000.0})


def test_loss_and_throughput_are_said_where_there_is_no_terminal() -> None:
    text, _ = shown(STARTED, step(1), step(2))
    assert "2,400,000 parameters" in text
    assert "step 2/10" in text
    assert "loss 3.250" in text
    assert "8,000 tok/s" in text


def test_an_evaluation_is_said_with_all_that_it_measured() -> None:
    measured = {"loss": 0.51234, "reward_margin": 1.5, "reward_accuracy": 0.75}
    text, _ = shown(
        STARTED, events.encode({"event": "evaluation", "step": 4, "rows": 64, "averaged": True, **measured})
    )
    assert "evaluation at step 4: loss 0.5123  reward_margin 1.5  reward_accuracy 0.75 (64 rows)" in text


def test_a_restart_is_said_with_its_reason() -> None:
    text, _ = shown(STARTED, events.encode({"event": "restart", "reason": "worker 1 died [SIGKILL]"}))
    assert "restarted: worker 1 died [SIGKILL]" in text


def test_the_closing_event_is_kept_and_other_lines_are_remembered() -> None:
    _, view = shown(STARTED, "Traceback: x", events.encode({"event": "failed", "error": "disk full"}))
    assert view.ended is not None
    assert view.ended["error"] == "disk full"
    assert view.other_lines == ["Traceback: x"]


def test_raw_prints_every_line_as_it_is() -> None:
    text, _ = shown(STARTED, "plain [line]", raw=True)
    assert "plain [line]" in text
    assert "@tandem" in text
