"""What is done about numbers that went wrong: steps that are not finite, and a loss that jumps. Every rank decides alike."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.config import SpikeConfig
from tandem.errors import JobError


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedStep:
    """A step that was not taken."""

    step: int
    first: int
    """Its rows are those from here, in the order of the stream."""
    rows: int
    suspects: tuple[int, ...]
    """Of these, the ones that a rank saw whose own loss was not finite; none if only gradients were not."""
    in_a_row: int

    def describe(self) -> str:
        """In words."""
        where = f"rows {self.first} to {self.first + self.rows - 1}"
        if self.suspects and len(self.suspects) < self.rows:
            where += f"; the loss went wrong among {_listed(self.suspects)}"
        return f"step {self.step} ({where})"


class NonFiniteGuard:
    """Counts steps that were left out, and ends the run after `limit` in a row."""

    def __init__(self, limit: int) -> None:
        self._limit, self._found = limit, list[SkippedStep]()

    def record_taken(self) -> None:
        """A step was good."""
        self._found.clear()

    def record_skipped(self, step: int, first: int, rows: int, suspects: Sequence[int]) -> SkippedStep:
        """A step was not; returns what is to be told of it."""
        found = SkippedStep(
            step=step, first=first, rows=rows, suspects=tuple(sorted(suspects)), in_a_row=len(self._found) + 1
        )
        self._found.append(found)
        return found

    def check(self) -> None:
        """JobError if there were too many."""
        if len(self._found) < self._limit:
            return
        told = [found.describe() for found in self._found]
        listed = "; ".join(told if len(told) <= 4 else [*told[:2], "...", *told[-1:]])
        raise JobError(
            f"Loss or gradients were not finite in {len(told)} steps in a row, which were left out: {listed}. Lower "
            "optimizer.learning_rate, look at these rows with `tandem data inspect`, or raise faults.max_nonfinite "
            f"({self._limit}); then run the job again."
        )


class SpikeDetector:
    """Finds losses that jump."""

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self._before: deque[float] = deque(maxlen=config.window)

    def median_exceeded_by(self, loss: float) -> float | None:
        """The median that this loss is too far above; None if it is not, and then it is among those that the next is held to."""
        if len(self._before) == self._config.window:
            middle = statistics.median(self._before)
            if loss > self._config.factor * middle:
                return middle
        self._before.append(loss)
        return None


class LossSpike(Exception):
    """The loss has jumped, and the run is to go back."""

    def __init__(self, *, step: int, rows: int, loss: float, median: float) -> None:
        """`rows`: of the stream, that were taken by then. `median`: of the losses before."""
        super().__init__(f"the loss of step {step} is {loss:.4g}, and was {median:.4g} before")
        self.step, self.rows, self.loss, self.median = step, rows, loss, median


def _listed(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:8]))
    return f"{shown} and {len(rows) - 8} more" if len(rows) > 8 else shown
