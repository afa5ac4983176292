"""Time to first token: 90th percentile over the last seconds. Pure: callers pass the clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW_S = 10.0
MAX_SAMPLES = 1000
"""Number of samples that are kept; the latest count."""


class TtftWindow:
    """Times to first token of the last `WINDOW_S` seconds, written by one thread and read by any."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=MAX_SAMPLES)

    def add(self, seconds: Iterable[float], now: float) -> None:
        """Add times, in seconds, of first tokens generated now."""
        self._samples.extend((now, sample) for sample in seconds)

    def percentile_90(self, now: float) -> float:
        """90th percentile in seconds; 0 without samples."""
        recent = sorted(seconds for generated_at, seconds in tuple(self._samples) if now - generated_at <= WINDOW_S)
        return recent[math.ceil(0.9 * len(recent)) - 1] if recent else 0.0
