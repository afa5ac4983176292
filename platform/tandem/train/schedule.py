"""Learning-rate schedules: warm-up, then cosine, linear, warmup-stable-decay or constant. Pure."""

from __future__ import annotations

import math

from tandem.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 1) of `steps`: a linear warm-up, then the schedule down to `final_fraction`."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    # With wsd, the rate before the decay does not depend on `steps`: a longer run can resume from any step before it.
    decay_start = config.warmup_steps if config.decay_steps is None else steps - config.decay_steps
    progress = min(1.0, max(0.0, (step - decay_start) / max(1, steps - decay_start)))
    match config.schedule:
        case "constant":
            return config.learning_rate
        case "linear" | "wsd":
            rate_factor = 1 - progress
        case _:
            rate_factor = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * rate_factor)
