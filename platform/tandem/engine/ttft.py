"""How long first tokens took lately. Pure: callers pass the clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

WINDOW_S = 10.0
MOST = 1000
"""First tokens that are looked at; beyond it only the latest."""


class TtftWindow:
    """The times to first token of the last `WINDOW_S`, written by one thread and read by any."""

    def __init__(self) -> None:
        self._taken: deque[tuple[float, float]] = deque(maxlen=MOST)

    def add(self, seconds: Iterable[float], now: float) -> None:
        """These have just been generated."""
        self._taken.extend((now, each) for each in seconds)

    def most(self, now: float) -> float:
        """What 9 of 10 did not exceed, in seconds; 0 for none."""
        lately = sorted(seconds for at, seconds in tuple(self._taken) if now - at <= WINDOW_S)
        return lately[math.ceil(0.9 * len(lately)) - 1] if lately else 0.0
