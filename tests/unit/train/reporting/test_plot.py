"""The plot of a run is drawn from its events."""

from __future__ import annotations

from pathlib import Path

from tandem.observability.events import Evaluated, Event, Restarted, Started, Step
from tandem.train.reporting.plot import plot_run, restarts


def step(number: int, loss: float) -> Step:
    return Step(step=number, loss=loss, learning_rate=1e-3, tokens_per_s=1000.0)


def test_a_run_with_a_restart_becomes_one_png(tmp_path: Path):
    events: list[Event] = [
        Started(),
        *(step(n, 5 / (n + 1)) for n in range(80)),
        *(step(n, 5 / (n + 1)) for n in range(60, 120)),
    ]
    events.append(Evaluated(step=100, measured={"loss": 0.1, "perplexity": 1.1}))
    assert plot_run(events, tmp_path / "loss.png", title="a model")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_steps_has_no_plot(tmp_path: Path):
    assert not plot_run([Started()], tmp_path / "loss.png", title="a model")
    assert not (tmp_path / "loss.png").exists()


def test_a_run_restarts_where_it_was_resumed_by_ray_or_by_a_new_submission():
    events = [
        Started(resumed_from=None),
        Restarted(resumed_from=60),
        Started(resumed_from=80),
        Restarted(resumed_from=None),
    ]
    assert restarts(events) == [60, 80, 0]
