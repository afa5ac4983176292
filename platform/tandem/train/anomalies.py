"""Numerical anomalies in training: non-finite steps and loss spikes. Every rank detects the same ones."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.config import SpikeConfig
from tandem.errors import JobError


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedStep:
    """A step that was not taken, because loss or gradients were not finite."""

    step: int
    first: int
    """First row of the step, in the order of the stream."""
    rows: int
    suspects: tuple[int, ...]
    """Rows of the ranks whose own loss was not finite; empty if only gradients were not."""
    in_a_row: int

    def describe(self) -> str:
        """The step and its rows in words."""
        row_range = f"rows {self.first} to {self.first + self.rows - 1}"
        if self.suspects and len(self.suspects) < self.rows:
            row_range += f"; the loss went wrong among {_join_rows(self.suspects)}"
        return f"step {self.step} ({row_range})"


class NonFiniteGuard:
    """Counts skipped steps, and ends the run after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self._limit, self._skipped = limit, list[SkippedStep]()

    def record_taken(self) -> None:
        """A step was taken: the count starts over."""
        self._skipped.clear()

    def record_skipped(self, step: int, first: int, rows: int, suspects: Sequence[int]) -> SkippedStep:
        """A step was skipped."""
        skipped_step = SkippedStep(
            step=step, first=first, rows=rows, suspects=tuple(sorted(suspects)), in_a_row=len(self._skipped) + 1
        )
        self._skipped.append(skipped_step)
        return skipped_step

    def check(self) -> None:
        """Raise JobError if `limit` steps in a row were skipped."""
        if len(self._skipped) < self._limit:
            return
        skipped = [step.describe() for step in self._skipped]
        descriptions = "; ".join(skipped if len(skipped) <= 4 else [*skipped[:2], "...", *skipped[-1:]])
        raise JobError(
            f"Loss or gradients were not finite in {len(skipped)} steps in a row, which were skipped: {descriptions}. Lower "
            "optimizer.learning_rate, look at these rows with `tandem data inspect`, or raise faults.max_nonfinite "
            f"({self._limit}); then run the job again."
        )


class SpikeDetector:
    """Detects losses above `factor` times the median of the last `window` reports."""

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._window_losses: deque[float] = deque(maxlen=config.window)

    def median_exceeded_by(self, loss: float) -> float | None:
        """The median that `loss` exceeds by the factor; None if it does not, and then the loss enters the window."""
        if len(self._window_losses) == self._config.window:
            median = statistics.median(self._window_losses)
            if loss > self._config.factor * median:
                return median
        self._window_losses.append(loss)
        return None


class LossSpike(Exception):
    """The loss jumped, and the run goes back to its newest checkpoint."""

    def __init__(self, *, step: int, rows: int, loss: float, median: float) -> None:
        """`rows`: rows of the stream consumed so far. `median`: of the losses before."""
        super().__init__(f"the loss of step {step} is {loss:.4g}, and was {median:.4g} before")
        self.step, self.rows, self.loss, self.median = step, rows, loss, median


def _join_rows(rows: Sequence[int]) -> str:
    first_rows = ", ".join(map(str, rows[:8]))
    return f"{first_rows} and {len(rows) - 8} more" if len(rows) > 8 else first_rows
