"""A run's picture is drawn from its events."""

from __future__ import annotations

from pathlib import Path

from tandem.train.reporting.plot import plot_run, restarts


def step(number: int, loss: float) -> dict[str, object]:
    return {"event": "step", "step": number, "loss": loss, "tokens_per_s": 1000.0}


def test_a_run_with_a_restart_becomes_one_png(tmp_path: Path):
    events = [
        {"event": "started"},
        *(step(n, 5 / (n + 1)) for n in range(80)),
        *(step(n, 5 / (n + 1)) for n in range(60, 120)),
    ]
    events.append({"event": "evaluation", "step": 100, "loss": 0.1, "perplexity": 1.1})
    assert plot_run(events, tmp_path / "loss.png", title="a model")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_drawn_of_nothing(tmp_path: Path):
    assert not plot_run([{"event": "started"}], tmp_path / "loss.png", title="a model")
    assert not (tmp_path / "loss.png").exists()


def test_a_run_restarts_where_it_was_resumed_by_ray_or_by_a_new_submission():
    events = [
        {"event": "started", "resumed_from": None},
        {"event": "restart", "resumed_from": 60},
        {"event": "started", "resumed_from": 80},
        {"event": "restart", "resumed_from": None},
    ]
    assert restarts(events) == [60, 80, 0]
