"""Parallelism config: workers, strategy, degrees and resources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.config import check
from tandem.errors import ConfigError, LayoutError

DEGREES = ("pipeline", "replicate", "context", "expert", "tensor")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """Parallel layout. The degrees multiply to `workers`; the remaining factor shards parameters and data."""

    workers: int = 1
    """Processes, each with one device (or one CPU thread). Written as `{min: 2, max: 4}`, this is the most, and the least is
    `min_workers`."""
    min_workers: int | None = None
    """Set: the run continues with fewer workers, at least so many, when nodes are lost, and grows when they come back."""
    strategy: str = "fsdp2"
    """fsdp2 (parameters, gradients and optimizer sharded), ddp (replicated) or deepspeed (ZeRO, as `deepspeed` says)."""
    pipeline: int = 1
    """Pipeline stages that the layers are split into."""
    replicate: int = 1
    """With fsdp2: groups that each hold all parameters (HSDP); the shards of a group stay near each other."""
    context: int = 1
    """Ranks that share each sequence."""
    expert: int = 1
    """Ranks that share the experts of a mixture; they are ranks that see different rows, so they come out of the data degree."""
    tensor: int = 1
    """Ranks that share each matrix multiplication; they stay inside one node."""
    sequence_parallel: bool = True
    """With tensor > 1: norms and residuals are sharded along the sequence."""
    schedule: str = "1f1b"
    """Pipeline schedule: gpipe, 1f1b, interleaved (two stages a rank) or zero_bubble."""
    offload: bool = False
    """With fsdp2: parameters, gradients and optimizer state stay in CPU memory, and the optimizer steps there."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for each worker; 0 trains on the CPU."""
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    """Other resources that Ray reserves for each worker, by the names that the cluster's nodes give them."""

    @staticmethod
    def as_written(values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings by their names: `workers: {min: 2, max: 4}` is two of them."""
        workers = values.get("workers")
        if not isinstance(workers, Mapping):
            return values
        if set(workers) != {"min", "max"}:
            raise ConfigError(
                f"parallel.workers has the keys {', '.join(map(str, workers)) or 'none'}; write a number, or both of min and max."
            )
        return {**values, "workers": workers["max"], "min_workers": workers["min"]}

    def __post_init__(self) -> None:
        for key in ("workers", *DEGREES):
            check.at_least(f"parallel.{key}", getattr(self, key), 1)
        if self.min_workers is not None:
            check.between("parallel.workers.min", self.min_workers, 1, self.workers)
        check.one_of("parallel.strategy", self.strategy, ("fsdp2", "ddp", "deepspeed"))
        check.one_of("parallel.schedule", self.schedule, SCHEDULES)
        check.at_least("parallel.cpus_per_worker", self.cpus_per_worker, 0.0)
        check.at_least("parallel.gpus_per_worker", self.gpus_per_worker, 0.0)
        check.resources("parallel.resources_per_worker", self.resources_per_worker)
        inner = self.pipeline * self.context * self.tensor
        named = " x ".join(
            f"{key}={getattr(self, key)}" for key in DEGREES if getattr(self, key) > 1 and key != "expert"
        )
        if self.strategy == "ddp" and self.offload:
            raise LayoutError(
                "parallel.offload is for fsdp2; ddp holds whole models. Set parallel.strategy to 'fsdp2'."
            )
        if self.strategy == "ddp" and self.replicate > 1:
            raise LayoutError("parallel.replicate is for fsdp2; ddp replicates across all workers. Leave it out.")
        if self.strategy == "ddp" and inner * self.expert > 1:
            raise LayoutError(
                f"parallel: {named or f'expert={self.expert}'} needs strategy fsdp2; ddp holds whole models."
            )
        if self.strategy == "deepspeed" and self.offload:
            raise LayoutError(
                "parallel.offload is for fsdp2. Leave it out; deepspeed.offload_optimizer and deepspeed.offload_parameters say "
                "what DeepSpeed keeps in the CPU's memory."
            )
        if self.strategy == "deepspeed" and inner * self.replicate * self.expert > 1:
            raise LayoutError(
                f"parallel: {' x '.join(f'{key}={getattr(self, key)}' for key in DEGREES if getattr(self, key) > 1)} needs "
                "strategy fsdp2; deepspeed shares the data only. Set strategy to 'fsdp2', or leave the degrees at 1."
            )
        if self.workers % (inner * self.replicate):
            group = inner * self.replicate
            nearest = max(group, round(self.workers / group) * group)
            raise LayoutError(
                f"parallel: {named} makes groups of {group}, and {self.workers} workers are no multiple of that. "
                f"The nearest that works is workers={nearest}."
            )
        if self.shard % self.expert:
            nearest = next(n for n in range(self.expert, 0, -1) if self.shard % n == 0)
            raise LayoutError(
                f"parallel.expert ({self.expert}) must divide the ranks that shard the data ({self.shard}: {self.workers} "
                f"workers / {inner * self.replicate}). The nearest that works is expert={nearest}."
            )

    @property
    def group(self) -> int:
        """Size of the smallest unit of workers: one model-parallel group of each replica."""
        return self.pipeline * self.replicate * self.context * self.tensor * self.expert

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the parameters and see different rows."""
        return self.workers // (self.pipeline * self.replicate * self.context * self.tensor)

    @property
    def layout(self) -> str:
        """Description of the layout: the strategy, and the degrees above 1."""
        degrees = {key: getattr(self, key) for key in DEGREES} | {"shard": self.shard}
        if self.strategy == "ddp" or list(degrees.values()) == [1] * len(DEGREES) + [self.shard]:
            return self.strategy
        degrees_text = " x ".join(f"{key} {degree}" for key, degree in degrees.items() if degree > 1)
        return f"{self.strategy}, {degrees_text}" + (f" ({self.schedule})" if self.pipeline > 1 else "")

    @property
    def data(self) -> int:
        """Data-parallel degree: groups of ranks that see different rows."""
        return self.replicate * self.shard
