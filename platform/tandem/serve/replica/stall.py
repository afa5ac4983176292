"""Tells a stuck engine from a busy one. Pure: callers pass what the engine says of itself, and the clock.

An engine whose process is stopped, or waits for a rank that is, still has a replica that answers for it: its requests would wait
for ever. What it cannot do is end a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.engine.protocol import EngineStats


@dataclass(slots=True)
class StallDetector:
    """What one engine has got done, as seen from time to time."""

    limit_s: float
    """How long an engine with work may end no step."""
    progress_at_s: float = 0.0
    """When it last ended one, or had no work."""
    steps: int = -1
    had_work: bool = False
    """Whether it had work at the last look."""

    def observe(self, stats: EngineStats, now_s: float) -> None:
        """Look at the engine."""
        idle = not stats.running + stats.waiting
        # A stuck engine's requests are taken from it: that it has none is no sign of life, only a step is.
        if stats.steps != self.steps or not self.had_work or (idle and not self.is_stuck(now_s)):
            self.steps, self.progress_at_s, self.had_work = stats.steps, now_s, not idle

    def idle_s(self, now_s: float) -> float:
        """How long it has had work and ended no step."""
        return now_s - self.progress_at_s

    def is_stuck(self, now_s: float) -> bool:
        """Whether that is too long."""
        return self.idle_s(now_s) > self.limit_s
