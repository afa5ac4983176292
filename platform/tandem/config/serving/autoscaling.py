"""Autoscaling of a model's replicas: bounds, targets and delays."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscalingConfig:
    """Bounds, targets and delays of `serve.autoscale.decide`; the target that requires the most replicas counts."""

    min_replicas: int = 1
    """0: an idle model has no replica; the first request starts one and waits."""
    max_replicas: int = 2
    initial_replicas: int | None = None
    """Replicas at the first deploy; unset: min_replicas."""
    target_waiting: float = 2.0
    """Waiting requests for each replica, in its engine and at the gateways together."""
    target_kv_usage: float = 0.8
    """Used share of a replica's KV cache."""
    target_running: float | None = None
    """Running requests of a replica; unset: the engine's own limit."""
    target_ttft_s: float | None = None
    """90th percentile of the time to first token over the last seconds; unset: not used."""
    upscale_delay_s: float = 2.0
    """Seconds for which more replicas must be required before they are added."""
    downscale_delay_s: float = 60.0
    """Seconds for which fewer replicas must have been enough; the largest number required in that time remains."""
    downscale_to_zero_delay_s: float | None = None
    """Seconds for which a model must have been idle to lose its last replica; unset: downscale_delay_s."""

    def __post_init__(self) -> None:
        key = "models[].autoscaling"
        check.at_least(f"{key}.min_replicas", self.min_replicas, 0)
        check.at_least(f"{key}.max_replicas", self.max_replicas, 1)
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"{key}.max_replicas is {self.max_replicas} and min_replicas {self.min_replicas}. Raise max_replicas."
            )
        if self.initial_replicas is not None:
            check.between(f"{key}.initial_replicas", self.initial_replicas, self.min_replicas, self.max_replicas)
        _check_positive(f"{key}.target_waiting", self.target_waiting)
        _check_positive(f"{key}.target_kv_usage", self.target_kv_usage)
        check.between(f"{key}.target_kv_usage", self.target_kv_usage, 0.0, 1.0)
        for name in ("target_running", "target_ttft_s"):
            if (value := getattr(self, name)) is not None:
                _check_positive(f"{key}.{name}", value)
        check.at_least(f"{key}.upscale_delay_s", self.upscale_delay_s, 0.0)
        check.at_least(f"{key}.downscale_delay_s", self.downscale_delay_s, 0.0)
        if self.downscale_to_zero_delay_s is not None:
            check.at_least(f"{key}.downscale_to_zero_delay_s", self.downscale_to_zero_delay_s, 0.0)


def _check_positive(key: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{key} is {value}; it must be above 0.")
