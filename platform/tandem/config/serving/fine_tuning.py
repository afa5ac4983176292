"""Fine-tuning API config: resources and defaults of the jobs that clients create."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.config import check
from tandem.config.scheduling import duration_s, with_quoted_durations
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FineTuningConfig:
    """Jobs of `/v1/fine_tuning`. Each trains a LoRA adapter of a served model."""

    enabled: bool = True
    """Whether keys with the role trainer or admin can create jobs."""
    runner: str = "ray"
    """Where jobs run: `ray`, on the app's cluster, or `slurm`, as jobs of the Slurm cluster of `slurm.yaml` in TANDEM_HOME."""
    nodes: int = 1
    """Nodes of a job on Slurm, which share its workers."""
    workers: int = 1
    """Training processes of a job."""
    min_workers: int | None = None
    """Set: a job goes on with fewer workers, at least so many, where others need the resources."""
    priority: str | None = None
    """Priority class of the jobs, one of `scheduling.priority_classes`; unset: the default one."""
    time_limit: str | None = None
    """Longest run time of a job over all restarts, in one of Slurm's forms; unset: none."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    precision: str = "float32"
    """As `precision` of a training job; bfloat16 on GPUs."""
    rank: int = 16
    """LoRA rank. Replicas that serve the adapters take at most their `max_lora_rank`."""
    learning_rate: float = 2e-4
    """Learning rate at `learning_rate_multiplier` 1."""
    sequence_length: int = 4096
    """Tokens of an example at most; the rest of a longer one is cut off. A job takes less where its examples are shorter."""
    checkpoints: int = 3
    """Newest checkpoints that can be called as models."""
    max_epochs: int = 50
    """Epochs that a client may request at most."""
    max_active: int = 100
    """Jobs of one tenant that have not ended, at most."""

    @staticmethod
    def as_written(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings as they are; durations must be text."""
        return with_quoted_durations(values)

    def __post_init__(self) -> None:
        check.at_least("gateway.fine_tuning.workers", self.workers, 1)
        check.one_of("gateway.fine_tuning.runner", self.runner, ("ray", "slurm"))
        check.at_least("gateway.fine_tuning.nodes", self.nodes, 1)
        if self.runner == "ray" and self.nodes > 1:
            raise ConfigError(
                "gateway.fine_tuning.nodes is for runner: slurm; Ray chooses the nodes of its jobs. Unset it."
            )
        if self.workers % self.nodes:
            nearest = self.nodes * max(1, round(self.workers / self.nodes))
            raise ConfigError(
                f"gateway.fine_tuning.workers ({self.workers}) must be a multiple of nodes ({self.nodes}). The nearest that "
                f"works is {nearest}."
            )
        if self.runner == "slurm" and self.min_workers is not None:
            raise ConfigError(
                "gateway.fine_tuning.min_workers is for runner: ray; a Slurm job keeps its nodes. Unset it."
            )
        if self.min_workers is not None:
            check.between("gateway.fine_tuning.min_workers", self.min_workers, 1, self.workers)
        if self.time_limit is not None:
            duration_s("gateway.fine_tuning.time_limit", self.time_limit)
        check.between("gateway.fine_tuning.rank", self.rank, 1, 512)
        check.at_least("gateway.fine_tuning.sequence_length", self.sequence_length, 8)
        check.at_least("gateway.fine_tuning.checkpoints", self.checkpoints, 0)
        check.at_least("gateway.fine_tuning.max_epochs", self.max_epochs, 1)
        check.at_least("gateway.fine_tuning.max_active", self.max_active, 1)
        check.one_of("gateway.fine_tuning.precision", self.precision, ("float32", "bfloat16", "float16", "float8"))
        check.at_least("gateway.fine_tuning.learning_rate", self.learning_rate, 1e-12)

    @property
    def gpus_per_node(self) -> int:
        """GPUs that a job on Slurm needs on each node."""
        return math.ceil(self.workers // self.nodes * self.gpus_per_worker)

    @property
    def worker_counts(self) -> list[int]:
        """Possible numbers of a job's workers, ascending: those among which its batches, made for the most, can be shared."""
        least = self.workers if self.min_workers is None else self.min_workers
        return [count for count in range(least, self.workers + 1) if self.workers % count == 0]
