"""A training job: what to train, on what, for how long, across how many workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.config import check
from tandem.config.data import DataConfig
from tandem.config.model import LoraConfig, ModelConfig
from tandem.errors import ConfigError
from tandem.ids import check_name


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """How the workers share the work."""

    workers: int = 1
    """Processes, each with one device (or one CPU thread)."""
    strategy: str = "fsdp2"
    """fsdp2 (parameters, gradients and optimizer sharded) or ddp (replicated)."""
    cpus_per_worker: float = 1.0
    """CPUs that Ray reserves for each worker."""
    gpus_per_worker: float = 0.0
    """GPUs that Ray reserves for each worker; 0 trains on the CPU."""

    def __post_init__(self) -> None:
        check.at_least("parallel.workers", self.workers, 1)
        check.one_of("parallel.strategy", self.strategy, ("fsdp2", "ddp"))
        check.at_least("parallel.cpus_per_worker", self.cpus_per_worker, 0.0)
        check.at_least("parallel.gpus_per_worker", self.gpus_per_worker, 0.0)


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
        share = self.parallel.workers * self.accumulate
        if self.batch_size % share:
            fits = max(share, round(self.batch_size / share) * share)
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of parallel.workers x accumulate "
                f"({self.parallel.workers} x {self.accumulate} = {share}). The nearest that works is {fits}."
            )
        if self.lora is not None and self.model.base is None:
            raise ConfigError(
                "lora is set but model.base is not: an adapter needs the model it adapts. Set model.base."
            )
