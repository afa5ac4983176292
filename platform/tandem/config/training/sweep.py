"""Sweep parameters: `--param KEY=...` options to a list of trials, each with values for config keys. Pure.

optimizer.learning_rate=1e-3,3e-3                each of these; several such lists make a grid
optimizer.betas=[0.9,0.95],[0.9,0.99]            values are YAML, as for --set
optimizer.weight_decay=loguniform(1e-3,1e-1)     drawn at random for each trial: uniform, loguniform, randint (both ends in)
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.config.load import apply_overrides, from_dict
from tandem.config.training.job import TrainConfig
from tandem.errors import ConfigError, did_you_mean

METRICS = {
    "loss": "min",
    "evaluation_loss": "min",
    "perplexity": "min",
    "tokens_per_s": "max",
    "mfu": "max",
    "memory_bytes": "min",
}
"""Metrics that trials are compared by, and their better direction."""
DISTRIBUTIONS = ("uniform", "loguniform", "randint")
NOT_SWEPT = ("name", "register", "metrics")
"""Keys that do not change the result of a job."""

Trial = dict[str, str]
"""Values of one trial by key, as YAML text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A config key with its `choices`, or with a distribution from `low` to `high`."""

    key: str
    choices: tuple[str, ...] = ()
    distribution: str | None = None
    low: float = 0.0
    high: float = 0.0

    def draw(self, chance: random.Random) -> str:
        """A random value with four significant digits."""
        match self.distribution:
            case "uniform":
                return f"{chance.uniform(self.low, self.high):.4g}"
            case "loguniform":
                return f"{math.exp(chance.uniform(math.log(self.low), math.log(self.high))):.4g}"
            case "randint":
                return str(chance.randint(int(self.low), int(self.high)))
            case _:
                return chance.choice(self.choices)


def parse_parameter(option: str) -> Parameter:
    """Parse one `KEY=...`; ConfigError if it is invalid."""
    key, equals, spec = (part.strip() for part in option.partition("="))
    if not equals or not key or not spec:
        raise ConfigError(f"--param {option!r} is not of the form KEY=VALUE,VALUE or KEY=loguniform(LOW,HIGH).")
    if key.split(".")[0] in NOT_SWEPT:
        raise ConfigError(f"--param {option!r}: {key} is the same for all trials of a sweep. Set it in the config.")
    call = re.fullmatch(r"([a-z_]+)\((.*)\)", spec)
    if call is None:
        choices = tuple(split_values(spec))
        if doubled := next((c for c in choices if choices.count(c) > 1), None):
            raise ConfigError(f"--param {option!r}: {doubled} is there twice.")
        return Parameter(key=key, choices=choices)
    name, inner = call.groups()
    if name not in DISTRIBUTIONS:
        raise ConfigError(
            f"--param {option!r}: {name} is not a distribution.{did_you_mean(name, DISTRIBUTIONS)} "
            f"Known: {', '.join(DISTRIBUTIONS)}."
        )
    try:
        low, high = (int(n) if name == "randint" else float(n) for n in inner.split(","))
    except ValueError:
        kind = "whole numbers" if name == "randint" else "numbers"
        raise ConfigError(f"--param {option!r}: {name} takes two {kind}, LOW,HIGH.") from None
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"--param {option!r}: the low end ({low}) must be below the high end ({high}).")
    if name == "loguniform" and low <= 0:
        raise ConfigError(f"--param {option!r}: loguniform starts above 0, not at {low}.")
    return Parameter(key=key, distribution=name, low=low, high=high)


def split_values(spec: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes; ConfigError for an empty value."""
    values, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(spec):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(spec[start:at].strip())
            start = at + 1
    values.append(spec[start:].strip())
    if not all(values):
        raise ConfigError(f"{spec!r} has an empty value. Write null for none.")
    return values


def plan_trials(parameters: Sequence[Parameter], trials: int | None, *, seed: int = 0) -> list[Trial]:
    """The trials of a sweep, the same for the same seed and all different.

    Lists make a grid, of which `trials` cells are sampled if it is larger. With distributions, the grid is repeated as often as
    `trials` needs. Raises ConfigError if `trials` is missing, or more than the number of combinations.
    """
    if not parameters:
        raise ConfigError("A sweep needs something to try: --param optimizer.learning_rate=1e-3,3e-3.")
    keys = [parameter.key for parameter in parameters]
    if doubled := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"--param {doubled} is given twice. Put all of its values into one.")
    grid_parameters = [parameter for parameter in parameters if parameter.choices]
    random_parameters = [parameter for parameter in parameters if not parameter.choices]
    grid = [
        dict(zip((p.key for p in grid_parameters), cell, strict=True))
        for cell in itertools.product(*(p.choices for p in grid_parameters))
    ]
    if trials is None and random_parameters:
        raise ConfigError(
            f"{random_parameters[0].key} is drawn at random: say how many trials, such as --trials {max(8, len(grid))}."
        )
    count = len(grid) if trials is None else trials
    if count < 1:
        raise ConfigError(f"--trials is {count}; it must be at least 1.")
    if count > len(grid) and not random_parameters:
        raise ConfigError(
            f"--trials is {count}, but there are only {len(grid)} combinations. Leave it out to try them all."
        )
    chance = random.Random(seed)
    cells = [grid[at] for at in sorted(chance.sample(range(len(grid)), count))] if count < len(grid) else grid
    planned: dict[tuple[str, ...], Trial] = {}
    for cell in itertools.islice(itertools.cycle(cells), 20 * count):
        trial = {p.key: cell[p.key] if p.choices else p.draw(chance) for p in parameters}
        # Equal draws are dropped.
        planned.setdefault(tuple(trial.values()), trial)
        if len(planned) == count:
            return list(planned.values())
    raise ConfigError(
        f"--trials is {count}, but only {len(planned)} different ones were found. Lower it, or widen a range."
    )


def trial_config(values: Mapping[str, Any], trial: Trial) -> TrainConfig:
    """The config of one trial: the sweep's with the trial's values; ConfigError names the trial."""
    try:
        return from_dict(TrainConfig, apply_overrides(values, (f"{key}={value}" for key, value in trial.items())))
    except ConfigError as error:
        raise ConfigError(f"The trial {describe_trial(trial)} cannot be: {error}") from error


def describe_trial(trial: Trial) -> str:
    """`optimizer.learning_rate=1e-3 seed=4`."""
    return " ".join(f"{key}={value}" for key, value in trial.items())


def is_better(metric: str, score: float, other: float) -> bool:
    """Whether `score` is better than `other`."""
    return score < other if METRICS[metric] == "min" else score > other
