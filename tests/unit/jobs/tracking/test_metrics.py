"""Metric series of a training run."""

from __future__ import annotations

from tandem.jobs.tracking.metrics import series_of
from tandem.observability.events import Evaluated, Event, Notice, Restarted, Step


def step(number: int, loss: float, **metrics: float) -> Step:
    return Step(time=float(number), step=number, loss=loss, learning_rate=1e-3, metrics=metrics)


def test_each_metric_of_steps_and_evaluations_is_a_series() -> None:
    events: list[Event] = [
        step(1, 3.0), Notice(message="x"), step(2, 2.0, accuracy=0.5), Evaluated(step=2, measured={"loss": 2.5}),
    ]  # fmt: skip
    found = {series.name: (series.steps, series.values) for series in series_of(events)}
    assert found == {
        "loss": ([1, 2], [3.0, 2.0]),
        "learning_rate": ([1, 2], [1e-3, 1e-3]),
        "accuracy": ([2], [0.5]),
        "evaluation_loss": ([2], [2.5]),
    }


def test_steps_that_were_computed_again_replace_those_before() -> None:
    events = [step(1, 3.0), step(2, 2.0), step(3, 9.0), Restarted(resumed_from=1), step(2, 1.5)]
    (loss,) = series_of(events, names=["loss"])
    assert (loss.steps, loss.values, loss.times) == ([1, 2], [3.0, 1.5], [1.0, 2.0])


def test_a_loss_that_is_not_finite_is_null() -> None:
    (loss,) = series_of([step(1, float("nan")), step(2, float("inf"))], names=["loss"])
    assert loss.values == [None, None]
    assert '"values":[null,null]' in loss.model_dump_json()


def test_later_steps_can_be_asked_for_alone() -> None:
    (loss,) = series_of([step(n, 1.0) for n in range(5)], names=["loss"], after_step=2)
    assert loss.steps == [3, 4]
