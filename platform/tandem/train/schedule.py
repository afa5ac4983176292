"""The learning rate of each step. Pure."""

from __future__ import annotations

import math

from tandem.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 1) of `steps`: a linear warm-up, then the schedule down to `final_fraction`."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1 - done
        case _:
            share = 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * share)
