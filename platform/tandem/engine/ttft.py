"""Time to first token: 90th percentile over the last seconds. Pure: callers pass the clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW_S = 10.0
MOST = 1000
"""Number of samples that are kept; the latest count."""


class TtftWindow:
    """Times to first token of the last `WINDOW_S` seconds, written by one thread and read by any."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, float]] = deque(maxlen=MOST)

    def add(self, seconds: Iterable[float], now: float) -> None:
        """Add times, in seconds, of first tokens generated now."""
        self._taken.extend((now, each) for each in seconds)

    def most(self, now: float) -> float:
        """90th percentile in seconds; 0 without samples."""
        lately = sorted(seconds for at, seconds in tuple(self._taken) if now - at <= WINDOW_S)
        return lately[math.ceil(0.9 * len(lately)) - 1] if lately else 0.0
