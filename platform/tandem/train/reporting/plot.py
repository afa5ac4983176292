"""Plot of a training run: loss, learning rate and throughput over steps, with evaluations and restarts marked."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

from tandem.observability.events import Evaluated, Event, Restarted, Started, Step
from tandem.storage import write_atomic

BLUE, GREEN, ORANGE, GREY = "#1f5fa8", "#2e7d4f", "#c8690e", "#888888"


def plot_run(events: Iterable[Event], path: Path, *, title: str) -> bool:
    """Draw loss, learning rate and tokens/s over steps to a PNG; False if there is no step to draw."""
    # No display is needed, and none may be opened.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = list(events)
    # A restart repeats steps: the last report of a step counts.
    steps = {event.step: event for event in events if isinstance(event, Step)}
    evaluations = {event.step: event.measured["loss"] for event in events if isinstance(event, Evaluated)}
    if not steps:
        return False
    at = sorted(steps)
    loss = [steps[step].loss or 0.0 for step in at]
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))

    above.set_title(f"{title}: loss {loss[-1]:.3f} after {at[-1]:,} steps", loc="left")
    many = len(at) > 50
    above.plot(at, loss, color=BLUE, alpha=0.3 if many else 1.0, linewidth=1, label="training, each report")
    if many:
        above.plot(at, _smooth(loss, max(5, len(at) // 50)), color=BLUE, linewidth=2, label="training, moving average")
    if evaluations:
        above.plot(
            *zip(*sorted(evaluations.items()), strict=True), "o-", color=ORANGE, markersize=4, label="evaluation"
        )
    above.set_ylabel("loss (nats per token)")
    middle.plot(at, [steps[step].learning_rate for step in at], color=ORANGE, linewidth=1)
    middle.set_ylabel("learning rate")
    middle.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    below.plot(at, [steps[step].tokens_per_s for step in at], color=GREEN, linewidth=1)
    below.set_ylabel("tokens/s")
    below.set_xlabel("optimizer step")

    for number, step in enumerate(restarts(events)):
        for axis in (above, middle, below):
            label = "restart" if number == 0 and axis is above else None
            axis.axvline(step, color=GREY, linestyle="--", linewidth=1, zorder=0, label=label)
    for axis in (middle, below):
        axis.set_ylim(bottom=0)
    for axis in (above, middle, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(above.get_legend_handles_labels()[0]) > 1:
        above.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomic(path, picture.getvalue())
    return True


def restarts(events: Iterable[Event]) -> list[int]:
    """The steps from which a run continued, after a fault or when it was submitted again."""
    found: list[int] = []
    started = False
    for event in events:
        if isinstance(event, Restarted) or (isinstance(event, Started) and started):
            found.append(event.resumed_from or 0)
        started = started or isinstance(event, Started)
    return found


def _smooth(values: list[float], width: int) -> list[float]:
    result, held = [], 0.0
    for number, value in enumerate(values):
        held += value
        if number >= width:
            held -= values[number - width]
        result.append(held / min(number + 1, width))
    return result
