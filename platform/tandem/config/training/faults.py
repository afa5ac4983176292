"""What a training run bears, and for how long, before it stops."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SpikeConfig:
    """When a loss has jumped: the run goes back to its newest checkpoint, and leaves out the rows that came after it."""

    factor: float = 2.0
    """A reported loss above this many times the median of the reports before is a spike."""
    window: int = 20
    """Reports that the median is taken over; until there are as many, nothing is a spike."""
    max_rollbacks: int = 3
    """Times that a run goes back, in all of its life, before it stops."""

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ConfigError(f"faults.spike.factor is {self.factor}; it must be above 1, such as 2.0.")
        check.at_least("faults.spike.window", self.window, 1)
        check.at_least("faults.spike.max_rollbacks", self.max_rollbacks, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultsConfig:
    """How faults are found, and what is done about them. How often a run starts again is `checkpoint.max_failures`."""

    heartbeat_s: float = 2.0
    """Seconds between a worker's signs of life."""
    hang_after_s: float = 60.0
    """Seconds without one, after which a worker counts as hung: its stack is reported, and the workers start again."""
    stuck_after_s: float = 1800.0
    """Seconds in which no worker gets anything done though all are alive, after which they start again."""
    slow_factor: float = 1.5
    """A worker that needs this many times what the middle one of all needs is named as slow."""
    max_nonfinite: int = 10
    """Steps in a row that are left out since their loss or gradients are not finite, at which the run stops."""
    spike: SpikeConfig | None = None
    """Set: a loss that jumps takes the run back to its newest checkpoint; unset: it goes on."""
    leave_s: float = 60.0
    """Seconds that a run which is told to stop has for a last checkpoint."""
    storage_retry_s: float = 120.0
    """Seconds over which a checkpoint is tried again if the storage refuses it; then the run stops."""
    grow_after_s: float = 10.0
    """With `parallel.workers: {min, max}`: seconds that there must be room for more workers before the run grows into it."""

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
