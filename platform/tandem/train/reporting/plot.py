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
    step_numbers = sorted(steps)
    loss = [steps[step].loss or 0.0 for step in step_numbers]
    figure = Figure(figsize=(8, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis, rate_axis, throughput_axis = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))

    loss_axis.set_title(f"{title}: loss {loss[-1]:.3f} after {step_numbers[-1]:,} steps", loc="left")
    dense = len(step_numbers) > 50
    loss_axis.plot(
        step_numbers, loss, color=BLUE, alpha=0.3 if dense else 1.0, linewidth=1, label="training, each report"
    )
    if dense:
        loss_axis.plot(
            step_numbers,
            _smooth(loss, max(5, len(step_numbers) // 50)),
            color=BLUE,
            linewidth=2,
            label="training, moving average",
        )
    if evaluations:
        loss_axis.plot(
            *zip(*sorted(evaluations.items()), strict=True), "o-", color=ORANGE, markersize=4, label="evaluation"
        )
    loss_axis.set_ylabel("loss (nats per token)")
    rate_axis.plot(step_numbers, [steps[step].learning_rate for step in step_numbers], color=ORANGE, linewidth=1)
    rate_axis.set_ylabel("learning rate")
    rate_axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    throughput_axis.plot(step_numbers, [steps[step].tokens_per_s for step in step_numbers], color=GREEN, linewidth=1)
    throughput_axis.set_ylabel("tokens/s")
    throughput_axis.set_xlabel("optimizer step")

    for number, step in enumerate(restarts(events)):
        for axis in (loss_axis, rate_axis, throughput_axis):
            label = "restart" if number == 0 and axis is loss_axis else None
            axis.axvline(step, color=GREY, linestyle="--", linewidth=1, zorder=0, label=label)
    for axis in (rate_axis, throughput_axis):
        axis.set_ylim(bottom=0)
    for axis in (loss_axis, rate_axis, throughput_axis):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if len(loss_axis.get_legend_handles_labels()[0]) > 1:
        loss_axis.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_atomic(path, image.getvalue())
    return True


def restarts(events: Iterable[Event]) -> list[int]:
    """The steps from which a run continued, after a fault or when it was submitted again."""
    steps: list[int] = []
    started = False
    for event in events:
        if isinstance(event, Restarted) or (isinstance(event, Started) and started):
            steps.append(event.resumed_from or 0)
        started = started or isinstance(event, Started)
    return steps


def _smooth(values: list[float], width: int) -> list[float]:
    averages, window_sum = [], 0.0
    for number, value in enumerate(values):
        window_sum += value
        if number >= width:
            window_sum -= values[number - width]
        averages.append(window_sum / min(number + 1, width))
    return averages
