"""A training job: what to train, on what, for how long, across how many workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.config import check
from tandem.config.data import DataConfig
from tandem.config.model import LoraConfig, ModelConfig
from tandem.errors import ConfigError, LayoutError
from tandem.ids import check_name

DEGREES = ("pipeline", "replicate", "context", "expert", "tensor")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """How the workers share the work. The degrees multiply to `workers`; what is left over shards the data."""

    workers: int = 1
    """Processes, each with one device (or one CPU thread)."""
    strategy: str = "fsdp2"
    """fsdp2 (parameters, gradients and optimizer sharded) or ddp (replicated)."""
    pipeline: int = 1
    """Stages that the layers are cut into, one after the other."""
    replicate: int = 1
    """With fsdp2: groups that each hold all parameters (HSDP); the shards of a group stay near each other."""
    context: int = 1
    """Ranks that share each sequence."""
    expert: int = 1
    """Ranks that share the experts of a mixture; they are ranks that see different rows, so they come out of the data degree."""
    tensor: int = 1
    """Ranks that share each matrix multiplication; they stay inside one node."""
    sequence_parallel: bool = True
    """With tensor > 1: what is between the matrix multiplications is shared too, along the sequence."""
    schedule: str = "1f1b"
    """Order of a pipeline's micro-batches: gpipe, 1f1b, interleaved (two parts of the model a rank) or zero_bubble."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for each worker; 0 trains on the CPU."""

    def __post_init__(self) -> None:
        for key in ("workers", *DEGREES):
            check.at_least(f"parallel.{key}", getattr(self, key), 1)
        check.one_of("parallel.strategy", self.strategy, ("fsdp2", "ddp"))
        check.one_of("parallel.schedule", self.schedule, SCHEDULES)
        check.at_least("parallel.cpus_per_worker", self.cpus_per_worker, 0.0)
        check.at_least("parallel.gpus_per_worker", self.gpus_per_worker, 0.0)
        inner = self.pipeline * self.context * self.tensor
        named = " x ".join(f"{key}={getattr(self, key)}" for key in DEGREES if getattr(self, key) > 1 and key != "expert")
        if self.workers % (inner * self.replicate):
            group = inner * self.replicate
            fits = max(group, round(self.workers / group) * group)
            raise LayoutError(
                f"parallel: {named} makes groups of {group}, and {self.workers} workers are no multiple of that. "
                f"The nearest that works is workers={fits}."
            )
        if self.strategy == "ddp" and self.replicate > 1:
            raise LayoutError("parallel.replicate is for fsdp2; ddp replicates across all workers. Leave it out.")
        if self.strategy == "ddp" and inner * self.expert > 1:
            raise LayoutError(f"parallel: {named or f'expert={self.expert}'} needs strategy fsdp2; ddp holds whole models.")
        if self.shard % self.expert:
            fits = next(n for n in range(self.expert, 0, -1) if self.shard % n == 0)
            raise LayoutError(
                f"parallel.expert ({self.expert}) must divide the ranks that shard the data ({self.shard}: {self.workers} "
                f"workers / {inner * self.replicate}). The nearest that works is expert={fits}."
            )

    @property
    def shard(self) -> int:
        """Ranks that share one copy of the parameters and see different rows."""
        return self.workers // (self.pipeline * self.replicate * self.context * self.tensor)

    @property
    def data(self) -> int:
        """Ranks, or groups of them, that see different rows."""
        return self.replicate * self.shard


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 10
    schedule: str = "cosine"
    """cosine or linear down to `final_fraction`, or constant."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check.one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "constant"))
        check.at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        check.at_least("optimizer.clip_norm", self.clip_norm, 0.0)
        check.between("optimizer.final_fraction", self.final_fraction, 0.0, 1.0)
        if not self.learning_rate > 0:
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When the state is saved, and how many saves are kept."""

    every_steps: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""
    max_failures: int = 3
    """Times that a run starts again from its newest checkpoint after a worker died."""

    def __post_init__(self) -> None:
        check.at_least("checkpoint.every_steps", self.every_steps, 0)
        check.at_least("checkpoint.keep", self.keep, 1)
        check.at_least("checkpoint.max_failures", self.max_failures, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training job."""

    name: str
    """What the result is called in the registry, and so by those who ask it."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    """Set: only adapters are trained, and an adapter of `model.base` is registered."""
    parallel: ParallelismConfig = field(default_factory=ParallelismConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 8
    """Packed rows in one optimizer step, over all workers."""
    accumulate: int = 1
    """Micro-batches that a worker cuts its share of a batch into."""
    precision: str = "float32"
    """float32 or bfloat16 (with float32 master weights)."""
    seed: int = 0
    log_every: int = 1
    """Steps between reports of loss and throughput."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check.one_of("precision", self.precision, ("float32", "bfloat16"))
        for key in ("steps", "batch_size", "accumulate", "log_every"):
            check.at_least(key, getattr(self, key), 1)
        share = self.parallel.data * self.accumulate
        if self.batch_size % share:
            fits = max(share, round(self.batch_size / share) * share)
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of the ranks that see different rows x accumulate "
                f"({self.parallel.data} x {self.accumulate} = {share}). The nearest that works is {fits}."
            )
        if self.lora is not None and self.model.base is None:
            raise ConfigError(
                "lora is set but model.base is not: an adapter needs the model it adapts. Set model.base."
            )
