"""Metric sinks of a job: Weights & Biases and MLflow. TensorBoard files are always written, in the job's folder."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """A run on Weights & Biases; its id is the job's. The key comes from WANDB_API_KEY or `wandb login`."""

    project: str
    entity: str | None = None
    """User or team; unset: the one that the key belongs to."""
    mode: str = "online"
    """online, or offline: written below the job's folder, for `wandb sync` to send later."""

    def __post_init__(self) -> None:
        check.one_of("metrics.wandb.mode", self.mode, ("online", "offline"))
        if not self.project:
            raise ConfigError("metrics.wandb.project is empty; name the project that the run belongs to.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MlflowConfig:
    """A run on an MLflow server or in an MLflow store; it carries the job's id as the tag `tandem.job`."""

    uri: str
    """Such as http://host:5000 or sqlite:////shared/mlflow.db."""
    experiment: str = "tandem"

    def __post_init__(self) -> None:
        for key in ("uri", "experiment"):
            if not getattr(self, key):
                raise ConfigError(f"metrics.mlflow.{key} is empty.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Systems that follow a job's numbers. Changing them does not make another job."""

    wandb: WandbConfig | None = None
    mlflow: MlflowConfig | None = None
