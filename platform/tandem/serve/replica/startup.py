"""How long a replica took to start, and with what: the wall-clock time of its process, cut where the next phase begins."""

from __future__ import annotations

import time

import psutil


class StartupTimer:
    """A stopwatch that began when this process did; Ray may have started the process ahead of need."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self.phases: dict[str, float] = {}
        """Seconds of each phase, in their order."""

    def done(self, phase: str) -> None:
        """The time since the last phase was this one's."""
        now = time.time()
        self.phases[phase] = round(now - self._last, 2)
        self._last = now
