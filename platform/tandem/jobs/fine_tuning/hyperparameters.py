"""Choice of hyperparameters that a client left to the platform (`auto`). Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.jobs.fine_tuning.spec import Hyperparameters

AUTO_EPOCHS = 3
FEW_EXAMPLES, MAX_AUTO_EPOCHS = 100, 25
"""Below so many examples an automatic job sees about this many in all its epochs together, in at most so many epochs."""
MANY_EXAMPLES = 25_000
"""Examples that an automatic job sees at most, unless one epoch has more."""
BATCH_SHARE, LARGEST_BATCH = 0.002, 256
"""An automatic batch has this share of the examples, and at most so many."""
AUTO_BETA = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenHyperparameters:
    """Hyperparameters of a job, none of them `auto`."""

    batch_size: int
    learning_rate_multiplier: float
    n_epochs: int
    beta: float


def choose(requested: Hyperparameters, examples: int) -> ChosenHyperparameters:
    """What a job with so many examples takes: what was requested, and defaults that follow the examples for the rest."""
    return ChosenHyperparameters(
        batch_size=min(requested.batch_size or auto_batch_size(examples), examples),
        learning_rate_multiplier=requested.learning_rate_multiplier or 1.0,
        n_epochs=requested.n_epochs or auto_epochs(examples),
        beta=requested.beta or AUTO_BETA,
    )


def auto_epochs(examples: int) -> int:
    """Three epochs, more for few examples, and fewer for many."""
    if examples * AUTO_EPOCHS < FEW_EXAMPLES:
        return min(MAX_AUTO_EPOCHS, math.ceil(FEW_EXAMPLES / examples))
    return max(1, min(AUTO_EPOCHS, MANY_EXAMPLES // examples))


def auto_batch_size(examples: int) -> int:
    """A share of the examples, from 1 to LARGEST_BATCH."""
    return max(1, min(LARGEST_BATCH, round(BATCH_SHARE * examples)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Steps and batches in packed rows, which hold several examples each."""

    steps: int
    batch_rows: int
    """Packed rows in an optimizer step."""
    steps_per_epoch: int


def plan(chosen: ChosenHyperparameters, *, examples: int, rows: int, workers: int) -> Plan:
    """The plan for `rows` packed rows an epoch, on workers that each take as many rows of a batch."""
    wanted = chosen.batch_size * rows / examples
    batch_rows = max(1, round(wanted / workers)) * workers
    steps_per_epoch = max(1, math.ceil(rows / batch_rows))
    return Plan(
        steps=max(1, math.ceil(chosen.n_epochs * rows / batch_rows)),
        batch_rows=batch_rows,
        steps_per_epoch=steps_per_epoch,
    )
