"""Fault tolerance config: hangs, slow ranks, non-finite steps, loss spikes, lost storage, resizing."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeConfig:
    """Loss spikes: the run goes back to its newest checkpoint, and skips the rows since."""

    factor: float = 2.0
    """A reported loss above this many times the median of the reports before is a spike."""
    window: int = 20
    """Reports that the median is taken over; nothing is a spike before there are as many."""
    max_rollbacks: int = 3
    """Rollbacks in the whole run; one more spike stops it."""

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ConfigError(f"faults.spike.factor is {self.factor}; it must be above 1, such as 2.0.")
        check.at_least("faults.spike.window", self.window, 1)
        check.at_least("faults.spike.max_rollbacks", self.max_rollbacks, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """Detection and handling of faults. `checkpoint.max_failures` limits restarts."""

    heartbeat_s: float = 2.0
    """Seconds between a worker's heartbeats."""
    hang_after_s: float = 60.0
    """Seconds without a heartbeat after which a worker counts as hung: its stack is reported, and the workers restart."""
    stuck_after_s: float = 1800.0
    """Seconds without progress on any worker, though all send heartbeats, after which the workers restart."""
    slow_factor: float = 1.5
    """A worker that needs this many times the median of the others is reported as slow."""
    max_nonfinite: int = 10
    """Skipped steps in a row, because loss or gradients are not finite, that stop the run."""
    spike: SpikeConfig | None = None
    """Set: a loss spike takes the run back to its newest checkpoint. Unset: it continues."""
    leave_s: float = 60.0
    """Seconds for a last checkpoint after a run is told to stop."""
    storage_retry_s: float = 120.0
    """Seconds over which a refused checkpoint is retried; then the run stops."""
    grow_after_s: float = 10.0
    """With `parallel.workers: {min, max}`: seconds of room for more workers before the run grows."""

    def __post_init__(self) -> None:
        for key in ("heartbeat_s", "hang_after_s", "stuck_after_s"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"faults.{key} is {getattr(self, key)}; it must be above 0.")
        if self.hang_after_s < 3 * self.heartbeat_s:
            raise ConfigError(
                f"faults.hang_after_s ({self.hang_after_s:g}) is less than three heartbeats ({self.heartbeat_s:g} s each): one "
                f"that is late would end the workers. Raise it to {3 * self.heartbeat_s:g}, or lower faults.heartbeat_s."
            )
        if not self.slow_factor > 1:
            raise ConfigError(f"faults.slow_factor is {self.slow_factor}; it must be above 1, such as 1.5.")
        check.at_least("faults.max_nonfinite", self.max_nonfinite, 1)
        for key in ("leave_s", "storage_retry_s", "grow_after_s"):
            check.at_least(f"faults.{key}", getattr(self, key), 0.0)
