"""Specification of a fine-tuning job: what a client requested, with files and base resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.config.training.metrics import WandbConfig


class Method(StrEnum):
    """Training objective, by the API's names."""

    SUPERVISED = "supervised"
    DPO = "dpo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """Hyperparameters of a job; None: `auto`."""

    batch_size: int | None = None
    """Examples in one optimizer step."""
    learning_rate_multiplier: float | None = None
    """Factor on the learning rate of the platform's config."""
    n_epochs: int | None = None
    beta: float | None = None
    """Of DPO only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuningSpec:
    """One job. Files are locations that every node can read."""

    id: str
    """`ftjob-...`, also the name of the job's folder."""
    model: str
    """Name of the base as the client gave it."""
    base: str
    """Id in the registry, or folder, of the base."""
    result: str
    """Name that the adapter is registered under."""
    tenant: str | None = None
    training_file: str
    """Id of the file."""
    training_location: str
    validation_file: str | None = None
    validation_location: str | None = None
    method: str = Method.SUPERVISED.value
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    seed: int = 0
    wandb: WandbConfig | None = None
    platform: FineTuningConfig = field(default_factory=FineTuningConfig)
    """Settings of the platform when the job was created."""


def result_name(base: str, tenant: str, suffix: str | None, job_id: str, longest: int) -> str:
    """`ft:BASE:TENANT:SUFFIX:ID`, of at most `longest` characters: the base's name is cut where they are more."""
    rest = f":{tenant}:{suffix or ''}:{job_id.removeprefix('ftjob-')[:8]}"
    # A base from the hub is `org/name`, and a version of it `name@3`.
    short = base.rpartition("/")[2].partition("@")[0]
    return f"ft:{short[: max(1, longest - len(rest) - 3)]}{rest}"
