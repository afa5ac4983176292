"""Wire models of `/v1/fine_tuning`, as OpenAI's API has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Auto = Literal["auto"]
Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
MAX_SUFFIX = 64
METADATA_PAIRS, METADATA_KEY, METADATA_VALUE = 16, 64, 512
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=METADATA_KEY)],
        Annotated[str, StringConstraints(max_length=METADATA_VALUE)],
    ],
    Field(max_length=METADATA_PAIRS),
]


class SupervisedHyperparameters(BaseModel):
    """Hyperparameters of a supervised job; `auto`: the platform chooses."""

    model_config = ConfigDict(extra="forbid")

    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Examples in one optimizer step."""
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = "auto"
    n_epochs: Auto | Annotated[int, Field(ge=1)] = "auto"


class DpoHyperparameters(SupervisedHyperparameters):
    """Hyperparameters of a DPO job."""

    beta: Auto | Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = "auto"


class SupervisedMethod(BaseModel):
    """Supervised training."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: SupervisedHyperparameters = Field(default_factory=SupervisedHyperparameters)


class DpoMethod(BaseModel):
    """Direct preference optimization."""

    model_config = ConfigDict(extra="forbid")

    hyperparameters: DpoHyperparameters = Field(default_factory=DpoHyperparameters)


class FineTuningMethod(BaseModel):
    """How a job trains."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["supervised", "dpo"]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None

    @model_validator(mode="after")
    def _check_type(self) -> FineTuningMethod:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f"has `{other}`, and `type` is {self.type}")
        return self


class WandbIntegration(BaseModel):
    """Reports to Weights & Biases."""

    model_config = ConfigDict(extra="forbid")

    project: str = Field(min_length=1, max_length=128)
    entity: str | None = Field(default=None, max_length=128)
    name: str | None = Field(default=None, max_length=128)
    tags: list[Annotated[str, StringConstraints(max_length=64)]] = Field(default_factory=list, max_length=50)


class Integration(BaseModel):
    """A system that a job reports to."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["wandb"]
    wandb: WandbIntegration


class FineTuningCreation(BaseModel):
    """Body of a creation."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(min_length=1, max_length=256, description="a base model that the app serves")
    training_file: str = Field(min_length=1, max_length=64, description="id of a file of the purpose fine-tune")
    validation_file: str | None = Field(default=None, min_length=1, max_length=64)
    method: FineTuningMethod | None = None
    hyperparameters: SupervisedHyperparameters | None = Field(default=None, description="deprecated: see `method`")
    suffix: str | None = Field(
        default=None, max_length=MAX_SUFFIX, pattern=r"^[A-Za-z0-9._-]*$", description="part of the result's name"
    )
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    integrations: list[Integration] | None = Field(default=None, max_length=1)
    metadata: Metadata | None = None

    @model_validator(mode="after")
    def _check_hyperparameters(self) -> FineTuningCreation:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("has `hyperparameters` and `method`; `method` has the hyperparameters of its type")
        return self


class FineTuningError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class FineTuningJob(BaseModel):
    """One job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    """Seconds since 1970; so are the other times."""
    error: FineTuningError | None = None
    fine_tuned_model: str | None = None
    """Name of the result; null until the job has succeeded."""
    finished_at: int | None = None
    hyperparameters: SupervisedHyperparameters
    """As they are requested, and once the files are read as they are chosen."""
    method: FineTuningMethod
    model: str
    organization_id: str
    """The tenant."""
    result_files: list[str] = Field(default_factory=list)
    seed: int
    status: Status
    trained_tokens: int | None = None
    training_file: str
    validation_file: str | None = None
    estimated_finish: int | None = None
    integrations: list[Integration] = Field(default_factory=list)
    metadata: dict[str, str] | None = None


class FineTuningJobList(BaseModel):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningJob]
    has_more: bool


class FineTuningEvent(BaseModel):
    """One event of a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = Field(default_factory=dict)


class FineTuningEventList(BaseModel):
    """One page of events, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class CheckpointMetrics(BaseModel):
    """Numbers at a checkpoint's step."""

    step: int
    train_loss: float | None = None
    valid_loss: float | None = None
    full_valid_loss: float | None = None


class FineTuningCheckpoint(BaseModel):
    """One checkpoint of a job that can be called as a model."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    """Name to call it by."""
    fine_tuning_job_id: str
    metrics: CheckpointMetrics
    step_number: int


class FineTuningCheckpointList(BaseModel):
    """One page of checkpoints, newest first."""

    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
