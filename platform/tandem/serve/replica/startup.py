"""Startup timer: wall-clock seconds of each phase of a replica's start, from the start of its process."""

from __future__ import annotations

import time

import psutil


class StartupTimer:
    """Counts from the start of the process, which Ray may have started ahead of need."""

    def __init__(self) -> None:
        self._last = psutil.Process().create_time()
        self.phases: dict[str, float] = {}
        """Seconds of each phase, in order."""

    def done(self, phase: str) -> None:
        """End a phase: the time since the previous one counts for it."""
        now = time.time()
        self.phases[phase] = round(now - self._last, 2)
        self._last = now
