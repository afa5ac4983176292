"""Training job config: model, data, objective, optimizer, parallelism, checkpoints and faults of one job."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.config import check
from tandem.config.scheduling import JobSchedulingConfig
from tandem.config.training.data import DataConfig
from tandem.config.training.deepspeed import DeepSpeedConfig
from tandem.config.training.faults import FaultsConfig
from tandem.config.training.metrics import MetricsConfig
from tandem.config.training.model import LoraConfig, ModelConfig
from tandem.config.training.objective import DpoConfig, EvaluationConfig
from tandem.config.training.optimizer import OptimizerConfig
from tandem.config.training.parallel import ParallelismConfig
from tandem.errors import ConfigError
from tandem.ids import check_name
from tandem.storage import is_remote


def _check_location(key: str, path: str | None) -> None:
    """ConfigError for a relative path: workers run in folders of their own."""
    if path is not None and not is_remote(path) and not path.startswith(("/", "~", "file://")):
        raise ConfigError(
            f"{key} is {path!r}, which is relative, and workers run in folders of their own. Give an absolute path, or a URI "
            "such as s3://bucket/runs."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints: interval, retention, location."""

    every_steps: int = 100
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Newest checkpoints kept."""
    best: str | None = None
    """A metric, such as evaluation_loss: the checkpoint that is best by it is kept beside the newest ones."""
    path: str | None = None
    """Folder for the checkpoints of all jobs, with a subfolder for each job: an absolute path that every node has, or a URI such
    as s3://bucket/runs. Unset: the job's folder."""
    asynchronous: bool = True
    """Write in the background while training continues, from a copy in the CPU's memory."""
    max_failures: int = 3
    """Failures in a row without a new checkpoint that a run survives."""
    exports: int = 0
    """Newest checkpoints that are also exported and registered: versions that requests reach by id, `name@3`, while the run goes
    on. Training waits while one is exported."""

    def __post_init__(self) -> None:
        check.at_least("checkpoint.every_steps", self.every_steps, 0)
        check.at_least("checkpoint.keep", self.keep, 1)
        _check_location("checkpoint.path", self.path)
        check.at_least("checkpoint.max_failures", self.max_failures, 0)
        check.at_least("checkpoint.exports", self.exports, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtensionConfig:
    """The checkpoint of another job that a job goes on from (`tandem train extend`)."""

    job: str
    """Id of that job."""
    checkpoint: str
    """Folder or URI of its checkpoint."""
    step: int
    """Step of the checkpoint; `steps` counts on from there."""
    rewarm: bool = False
    """Warm up and decay the learning rate anew, over the steps that are added."""

    def __post_init__(self) -> None:
        check.at_least("extends.step", self.step, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training job."""

    name: str
    """Name of the result in the registry, and in requests."""
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig | None = None
    """Set: trains an adapter of `model.base` instead of all weights."""
    parallel: ParallelismConfig = field(default_factory=ParallelismConfig)
    deepspeed: DeepSpeedConfig | None = None
    """Options of `parallel.strategy: deepspeed`; unset: ZeRO 3 without offload."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    """Detection and handling of hangs, numerical anomalies and lost storage."""
    steps: int = 100
    """Optimizer steps."""
    batch_size: int = 8
    """Packed rows in one optimizer step, over all workers."""
    accumulate: int = 1
    """Micro-batches that a worker splits its part of a batch into."""
    objective: str = "next_token"
    """next_token (pretraining, and fine-tuning on answers), or dpo (on preferences, from model.base)."""
    dpo: DpoConfig | None = None
    """Options of dpo; unset: the defaults."""
    evaluation: EvaluationConfig | None = None
    """Set: evaluates on held-out rows."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.999; set: evaluates and exports the average."""
    precision: str = "float32"
    """Compute type: float32, bfloat16, float16 (with a loss scaler) or float8 (on a GPU). Weights stay float32."""
    recompute: str = "none"
    """Activations recomputed in the backward pass, to save memory: none, selective (all but matrix products), full."""
    compile: bool = False
    """Compile the model's layers (torch.compile): faster steps on a GPU, after a first one that takes a minute longer."""
    attention: str = "sdpa"
    """sdpa, or flex: skips attention between documents of a row (on a GPU, with compile)."""
    extends: ExtensionConfig | None = None
    """Set by `tandem train extend`: the run goes on from a checkpoint of another job."""
    seed: int = 0
    log_every: int = 1
    """Steps between reports of loss and throughput."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Sinks of these reports beside the job's journal and TensorBoard."""
    scheduling: JobSchedulingConfig = field(default_factory=JobSchedulingConfig)
    """Priority, time limit and preemption, where a scheduler starts the job."""
    register: bool = True
    """Register the result under `name`; if false it stays in the job's folder, as for a sweep's trials."""
    tenant: str | None = None
    """Tenant that a new name belongs to; unset: an adapter's belongs to its base's tenant, and a model's is shared by all."""
    export_to: str | None = None
    """Folder or URI, such as s3://bucket/models, to which the result is copied when it is exported, in a subfolder for each job.
    An adapter is then registered from there."""

    def __post_init__(self) -> None:
        check_name(self.name)
        _check_location("export_to", self.export_to)
        check.one_of("objective", self.objective, ("next_token", "dpo"))
        check.one_of("precision", self.precision, ("float32", "bfloat16", "float16", "float8"))
        check.one_of("recompute", self.recompute, ("none", "selective", "full"))
        check.one_of("attention", self.attention, ("sdpa", "flex"))
        for key in ("steps", "batch_size", "accumulate", "log_every"):
            check.at_least(key, getattr(self, key), 1)
        unit = self.parallel.data * self.accumulate
        if self.batch_size % unit:
            nearest = max(unit, round(self.batch_size / unit) * unit)
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of the workers that see different rows x accumulate "
                f"({self.parallel.data} x {self.accumulate} = {unit}). The nearest that works is {nearest}."
            )
        if self.lora is not None and self.model.base is None:
            raise ConfigError(
                "lora is set but model.base is not: an adapter needs the model it adapts. Set model.base."
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(
                f"ema is {self.ema}; it must be above 0 and below 1, such as 0.999. Unset it for no average."
            )
        if self.extends is not None and self.steps <= self.extends.step:
            raise ConfigError(
                f"steps is {self.steps}, and {self.extends.job} has {self.extends.step} already. Raise steps above that."
            )
        self._check_device()
        self._check_deepspeed()
        self._check_compile()
        self._check_objective()
        self._check_evaluation()
        self._check_best()
        if self.optimizer.decay_steps is not None:
            min_steps = self.optimizer.warmup_steps + self.optimizer.decay_steps
            if min_steps > self.steps:
                raise ConfigError(
                    f"optimizer.warmup_steps + optimizer.decay_steps ({self.optimizer.warmup_steps} + "
                    f"{self.optimizer.decay_steps} = {min_steps}) is more than steps ({self.steps}). Lower one of them."
                )

    def check_kind(self, kind: str, dataset: str) -> None:
        """Raise ConfigError unless the objective can learn from a dataset of this kind (text, pairs, chats or preferences)."""
        if self.objective == "dpo" and kind != "preferences":
            raise ConfigError(
                f"objective is 'dpo', but {dataset} holds {kind}. Build a dataset of lines with prompt, chosen and "
                "rejected, or set objective to 'next_token'."
            )
        if self.objective == "next_token" and kind == "preferences":
            raise ConfigError(f"{dataset} holds preferences, which objective 'dpo' learns from, not 'next_token'.")
        if self.data.loss_on == "answers" and kind == "text":
            raise ConfigError(
                f"data.loss_on is 'answers', but {dataset} holds plain text without answers. Set data.loss_on to 'all'."
            )

    def _check_device(self) -> None:
        on_gpu = self.parallel.gpus_per_worker > 0
        if self.precision == "float8" and not on_gpu:
            raise ConfigError(
                "precision is 'float8', which only GPUs compute, and parallel.gpus_per_worker is 0. "
                "Set it to 1, or precision to 'bfloat16'."
            )
        if self.optimizer.name == "adamw_8bit" and not on_gpu:
            raise ConfigError(
                "optimizer.name is 'adamw_8bit', whose kernels are for GPUs, and parallel.gpus_per_worker is 0. "
                "Set it to 1, or optimizer.name to 'adamw'."
            )
        if self.lora is not None and self.lora.quantize and not on_gpu:
            raise ConfigError(
                f"lora.quantize is {self.lora.quantize!r}, whose kernels are for GPUs, and parallel.gpus_per_worker is 0. "
                "Set it to 1, or unset lora.quantize."
            )
        if self.precision == "float8" and self.lora is not None:
            raise ConfigError(
                f"precision is 'float8' and lora is set (rank {self.lora.rank}): float8 trains whole matrices, and adapters "
                "are too narrow to gain from it. Set precision to 'bfloat16', or unset lora."
            )

    def _check_deepspeed(self) -> None:
        if self.parallel.strategy != "deepspeed":
            if self.deepspeed is not None:
                raise ConfigError(
                    f"deepspeed is set, but parallel.strategy is {self.parallel.strategy!r}. Set it to 'deepspeed', or unset "
                    "deepspeed."
                )
            return
        fsdp2 = "or parallel.strategy to 'fsdp2'."
        for key, value, refused, instead in (
            ("precision", self.precision, "float8", "'bfloat16'"),
            ("optimizer.name", self.optimizer.name, "adamw_8bit", "'adamw'"),
            ("lora.quantize", self.lora and self.lora.quantize, "nf4", "null"),
            ("compile", self.compile, True, "false"),
            ("attention", self.attention, "flex", "'sdpa'"),
        ):
            if value == refused:
                raise ConfigError(
                    f"{key} is {value!r}, which does not go with parallel.strategy 'deepspeed'. Set it to {instead}, {fsdp2}"
                )
        stage = (self.deepspeed or DeepSpeedConfig()).stage
        if stage < 3:
            return
        if self.ema is not None:
            raise ConfigError(
                f"ema is {self.ema}, but ZeRO 3 leaves no rank with parameters to average. Set deepspeed.stage to 1 or 2, {fsdp2}"
            )
        if self.lora is not None and self.lora.dora:
            raise ConfigError(
                "lora.dora is on, which reads weights that ZeRO 3 has let go of by then. Set deepspeed.stage to 1 or 2, "
                f"{fsdp2}"
            )

    def _check_compile(self) -> None:
        parallel = self.parallel
        if self.compile and parallel.pipeline > 1 and parallel.schedule == "zero_bubble":
            raise ConfigError(
                "compile is on and parallel.schedule is 'zero_bubble', which splits the backward pass of a layer: one that is "
                "compiled is a single piece. Set compile to false, or parallel.schedule to 'interleaved'."
            )
        if self.attention == "flex":
            if parallel.gpus_per_worker == 0 or not self.compile:
                raise ConfigError(
                    f"attention is 'flex', which is fast only when compiled on a GPU; compile is {str(self.compile).lower()} and "
                    f"parallel.gpus_per_worker is {parallel.gpus_per_worker:g}. Set both, or attention to 'sdpa'."
                )
            if parallel.context > 1:
                raise ConfigError(
                    f"attention is 'flex' and parallel.context is {parallel.context}: sequences that are shared have an "
                    "attention of their own. Set attention to 'sdpa', or parallel.context to 1."
                )

    def _check_objective(self) -> None:
        if self.objective != "dpo":
            if self.dpo is not None:
                raise ConfigError(
                    f"dpo is set, but objective is {self.objective!r}. Set objective to 'dpo', or unset dpo."
                )
            return
        if self.model.base is None:
            raise ConfigError(
                "objective is 'dpo' but model.base is not set: preferences change a model that answers already. "
                "Set model.base; `tandem models ls` lists what there is."
            )
        if self.data.loss_on == "all":
            raise ConfigError(
                "data.loss_on is 'all', but dpo compares answers, and the prompt is the same in both. "
                "Leave data.loss_on at 'auto'."
            )

    def _check_evaluation(self) -> None:
        training_paths = [part.path for part in self.data.parts]
        if self.evaluation is not None and self.evaluation.data in training_paths:
            key = "data.path" if self.data.path else "data.mixture"
            raise ConfigError(
                f"evaluation.data is {self.evaluation.data!r}, which is trained on ({key}). Name another dataset, or "
                "unset it to hold out a share of this one."
            )

    def _check_best(self) -> None:
        best, every = self.checkpoint.best, self.checkpoint.every_steps
        if best is None or best == "loss":
            return
        if not best.startswith("evaluation_"):
            raise ConfigError(
                f"checkpoint.best is {best!r}; it must be 'loss', or what an evaluation measures with 'evaluation_' before it, "
                "such as 'evaluation_loss'."
            )
        if self.evaluation is None:
            raise ConfigError(f"checkpoint.best is {best!r}, but evaluation is not set. Set evaluation, or unset it.")
        evaluation_every = self.evaluation.every_steps
        if every and evaluation_every and every % evaluation_every:
            raise ConfigError(
                f"checkpoint.best is {best!r}, which is known of checkpoints that are made with an evaluation: "
                f"checkpoint.every_steps ({every}) must be a multiple of evaluation.every_steps ({evaluation_every})."
            )
