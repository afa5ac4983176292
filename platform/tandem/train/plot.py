"""The loss curve of a run, as a picture."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tandem.storage import write_atomic


def plot_run(events: Iterable[dict[str, Any]], path: Path, *, title: str) -> bool:
    """Draw loss and tokens/s over steps to a PNG; False if there is no step to draw."""
    # No display is needed, and none may be opened.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A restart repeats steps: the last report of a step is the one that counts.
    steps = {event["step"]: event for event in events if event["event"] == "step"}
    if not steps:
        return False
    at = sorted(steps)
    loss = [steps[step]["loss"] for step in at]
    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot(at, loss, color="#1f5fa8", alpha=0.3 if len(at) > 50 else 1.0, linewidth=1, label="each step")
    if len(at) > 50:
        above.plot(at, _smooth(loss, max(5, len(at) // 50)), color="#1f5fa8", linewidth=2, label="moving average")
        above.legend(frameon=False)
    above.set_ylabel("loss (nats per token)")
    above.set_title(f"{title}: loss {loss[-1]:.3f} after {at[-1]:,} steps")
    below.plot(at, [steps[step]["tokens_per_s"] for step in at], color="#2e7d4f", linewidth=1)
    below.set_ylabel("tokens/s")
    below.set_ylim(bottom=0)
    below.set_xlabel("optimizer step")
    for axis in (above, below):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_atomic(path, picture.getvalue())
    return True


def _smooth(values: list[float], width: int) -> list[float]:
    result, held = [], 0.0
    for number, value in enumerate(values):
        held += value
        if number >= width:
            held -= values[number - width]
        result.append(held / min(number + 1, width))
    return result
