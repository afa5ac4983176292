"""Metric series of a training run, from its events. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from tandem.api import jobs as wire
from tandem.observability.events import Evaluated, Event, Step

STEP_METRICS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "seconds",
    "mfu",
    "memory_bytes",
    "data_wait",
)
"""Fields of a step's report that are series; those of `metrics` are too."""
EVALUATION_PREFIX = "evaluation_"


def series_of(events: Iterable[Event], *, names: Collection[str] = (), after_step: int = -1) -> list[wire.TandemSeries]:
    """The series in the order in which they begin; `names`: of these alone, `after_step`: of later steps alone.

    After a restart or a rollback steps are computed again: values of the same and of later steps are then replaced.
    """
    found: dict[str, wire.TandemSeries] = {}
    for event in events:
        if not isinstance(event, Step | Evaluated):
            continue
        for name, value in _values(event):
            if names and name not in names:
                continue
            series = found.setdefault(name, wire.TandemSeries(name=name, steps=[], values=[], times=[]))
            while series.steps and series.steps[-1] >= event.step:
                for column in (series.steps, series.values, series.times):
                    column.pop()
            series.steps.append(event.step)
            series.values.append(value if math.isfinite(value) else None)
            series.times.append(event.time)
    return [_later(series, after_step) for series in found.values()]


def _values(event: Step | Evaluated) -> Iterator[tuple[str, float]]:
    if isinstance(event, Evaluated):
        yield from ((f"{EVALUATION_PREFIX}{name}", value) for name, value in _numbers(event.measured))
        return
    yield from _numbers({name: getattr(event, name) for name in STEP_METRICS})
    yield from _numbers(event.metrics)


def _numbers(values: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def _later(series: wire.TandemSeries, step: int) -> wire.TandemSeries:
    first = next((index for index, each in enumerate(series.steps) if each > step), len(series.steps))
    return wire.TandemSeries(
        name=series.name, steps=series.steps[first:], values=series.values[first:], times=series.times[first:]
    )
