"""Stall detection: an engine that has work and completes no step is stuck. Pure: callers pass stats and the clock.

An engine whose process is stopped, or waits for a rank that is, still has a replica that answers health checks, while its
requests would never end.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.engine.protocol import EngineStats


@dataclass(slots=True)
class StallDetector:
    """Progress of one engine between observations."""

    limit_s: float
    """Seconds that an engine with work may take for a step."""
    progress_at_s: float = 0.0
    """Time when it last completed a step or had no work."""
    steps: int = -1
    had_work: bool = False
    """Whether it had work at the last observation."""

    def observe(self, stats: EngineStats, now_s: float) -> None:
        """Record the engine's stats."""
        idle = not stats.running + stats.waiting
        # Gateways end the requests of a stuck engine: an empty engine is no sign of progress, only a step is.
        if stats.steps != self.steps or not self.had_work or (idle and not self.is_stuck(now_s)):
            self.steps, self.progress_at_s, self.had_work = stats.steps, now_s, not idle

    def idle_s(self, now_s: float) -> float:
        """Seconds for which it has had work and completed no step."""
        return now_s - self.progress_at_s

    def is_stuck(self, now_s: float) -> bool:
        """Whether that exceeds the limit."""
        return self.idle_s(now_s) > self.limit_s
