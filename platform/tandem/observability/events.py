"""Events of training jobs and sweeps: one frozen dataclass for each kind; `codec` reads and writes them as JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar

TYPES: dict[str, type[Event]] = {}
"""Kinds of events by their names."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. `class Step(Event, name="step")` declares the kind that is {"event": "step"} in JSON."""

    name: ClassVar[str]
    time: float | None = None
    """Seconds since 1970; stamped when the event is written."""

    def __init_subclass__(cls, *, name: str) -> None:
        cls.name = name
        TYPES[name] = cls


def _spread() -> Any:
    """A field whose items stand in the JSON object beside the other fields."""
    return field(default_factory=dict, metadata={"spread": True})


def _keyed(key: str, default: Any = MISSING) -> Any:
    """A field whose JSON key is not a Python name."""
    return field(default=default, metadata={"key": key})


# ---- a training run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Started(Event, name="started"):
    """Workers have built the model, loaded the checkpoint if there is one, and begin to train."""

    job: str = ""
    kind: str = ""
    """pretrain, sft or dpo."""
    workers: int | None = None
    nodes: int | None = None
    layout: str | None = None
    parameters: int = 0
    trainable: int = 0
    steps: int = 0
    resumed_from: int | None = None
    """Step of the checkpoint; None at the start."""


@dataclass(frozen=True, kw_only=True)
class Step(Event, name="step"):
    """Report of an optimizer step, every `log_every` steps (see `tandem.train.loop.StepReport`)."""

    step: int
    steps: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    mfu: float | None = None
    """Model FLOPs utilization, 0 to 1."""
    memory_bytes: int | None = None
    """Peak of rank 0: of its GPU, or of its process."""
    data_wait: float | None = None
    """Share of the time since the last report in which rank 0 waited for rows."""


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event, name="evaluation"):
    """Result of an evaluation."""

    step: int
    rows: int = 0
    averaged: bool = False
    """Whether the moving average of the weights was evaluated."""
    measured: Mapping[str, float] = _spread()
    """`loss`, and `perplexity` or the objective's other metrics."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event, name="checkpoint"):
    """A checkpoint is complete."""

    step: int
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointExported(Event, name="checkpoint_exported"):
    """The weights of a checkpoint's step are exported."""

    step: int
    path: str
    """Folder, in Hugging Face's or peft's format."""
    loss: float | None = None
    """Of the last step that was reported."""
    evaluation: Mapping[str, float] | None = None
    """Numbers of an evaluation at this step."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRegistered(Event, name="checkpoint_registered"):
    """An exported checkpoint can be requested by its id."""

    step: int
    model: str
    """Id in the registry."""


@dataclass(frozen=True, kw_only=True)
class FaultDetected(Event, name="fault"):
    """An attempt to run the workers, or the driver, ended unexpectedly."""

    kind: str
    """worker, workers, node, hang, mailbox, controller or driver."""
    reason: str = ""
    rank: int | None = None
    step: int = 0
    """Last step that was reported."""


@dataclass(frozen=True, kw_only=True)
class HangDetected(Event, name="hang"):
    """Ranks made no progress and were killed."""

    ranks: tuple[int, ...] = ()
    reason: str = ""
    stacks: Mapping[str, str] = field(default_factory=dict)
    """Python stack by rank: of those that hung, and of the others where they waited."""


@dataclass(frozen=True, kw_only=True)
class SlowRank(Event, name="slow"):
    """A rank needs much longer than the median of the others."""

    rank: int
    node: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class StepSkipped(Event, name="skipped"):
    """An optimizer step was not taken, because the loss or a gradient was not finite."""

    step: int
    first: int = 0
    """First row of the step, in the order of the stream."""
    rows: int = 0
    suspects: tuple[int, ...] = ()
    """Rows of the ranks whose own loss was not finite."""
    in_a_row: int = 1
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RolledBack(Event, name="rollback"):
    """The loss jumped; the run goes back to a checkpoint and skips the rows since."""

    from_step: int = _keyed("from")
    step: int = 0
    """Step of the checkpoint; 0 is the start."""
    rows: tuple[int, int] = (0, 0)
    """Skipped rows: the first, and the one after the last."""
    loss: float | None = None
    median: float | None = None
    """Of the losses before."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Resized(Event, name="resized"):
    """The run continues with another number of workers."""

    from_workers: int | None = _keyed("from", None)
    to_workers: int | None = _keyed("to", None)
    layout: str | None = None
    reason: str = ""
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Restarted(Event, name="restart"):
    """Workers started again after an attempt ended."""

    reason: str = ""
    resumed_from: int | None = None
    workers: int | None = None
    repeated: int = 0
    """Steps that are computed a second time."""
    lost_s: float | None = None
    """Seconds since the last step of the attempt before."""


@dataclass(frozen=True, kw_only=True)
class Stopped(Event, name="stopped"):
    """The job was told to stop; the same command continues it."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Notice(Event, name="notice"):
    """A message for the user."""

    message: str


@dataclass(frozen=True, kw_only=True)
class RegistrationFailed(Event, name="registration_failed"):
    """The result could not be put into the registry."""

    error: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event, name="finished"):
    """The job is done and its result is exported."""

    model: str | None = None
    """Id in the registry; None if it is not registered."""
    base: str | None = None
    """Id of the base of an adapter."""
    path: str | None = None
    plot: str | None = None
    loss: float | None = None
    evaluation: Mapping[str, float] | None = None
    """Numbers of the last evaluation."""
    tokens: int | None = None
    steps: int | None = None
    seconds: float | None = None
    dora: bool = field(default=False, metadata={"omit_default": True})
    """A DoRA adapter, which has to be merged before it is served."""


@dataclass(frozen=True, kw_only=True)
class Failed(Event, name="failed"):
    """The job or sweep ended with an error."""

    error: str = ""


@dataclass(frozen=True, kw_only=True)
class FineTuningPlanned(Event, name="fine_tuning_planned"):
    """The files of a fine-tuning job are read, and its hyperparameters chosen."""

    examples: int
    steps: int
    n_epochs: int
    batch_size: int
    """In examples."""
    learning_rate_multiplier: float
    beta: float | None = None
    """Of DPO."""


# ---- from the workers to the driver only -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Exported(Event, name="exported"):
    """The workers have trained to the last step, and the export is complete."""

    step: int
    loss: float | None = None
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class LossSpikeReport:
    """A loss far above the median of the losses before it."""

    rows: int
    """Rows of the stream that were taken by then."""
    loss: float
    median: float


@dataclass(frozen=True, kw_only=True)
class WorkersStopped(Event, name="left"):
    """The workers stopped before the last step: on command, or because the loss jumped."""

    step: int
    spike: LossSpikeReport | None = None


# ---- a sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SweepStarted(Event, name="sweeping"):
    """A sweep begins to run its trials."""

    sweep: str = ""
    trials: int = 0
    parallel: int = 1
    """Trials at a time."""


@dataclass(frozen=True, kw_only=True)
class TrialReported(Event, name="trial"):
    """State and newest numbers of a trial."""

    trial: int
    """From 1."""
    job: str = ""
    state: str = ""
    error: str | None = field(default=None, metadata={"omit_default": True})
    numbers: Mapping[str, float] = _spread()
    """step, steps, loss, tokens_per_s, evaluation_loss, and the metric that trials are compared by."""


@dataclass(frozen=True, kw_only=True)
class SweepFinished(Event, name="swept"):
    """All trials are done."""

    best: int
    """Number of the best trial, from 1."""
    score: float | None = None
    job: str = ""
    model: str | None = None
    """Id of the best trial's result in the registry; None if it is not registered."""
    scores: tuple[float | None, ...] = ()


# ---- a durable job of any kind ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StateChanged(Event, name="state"):
    """A job has another state in the database (`tandem.jobs.work.states`)."""

    from_state: str | None = _keyed("from", None)
    """None: it was submitted."""
    to_state: str = _keyed("to", "")
    action: str = ""
    """What caused it."""
    attempt: int = 0
    reason: str | None = field(default=None, metadata={"omit_default": True})


@dataclass(frozen=True, kw_only=True)
class ResizeRequested(Event, name="resize_requested"):
    """A job is to go on with another number of workers: its attempt saves and leaves, and the next has so many."""

    workers: int
    attempt: int = 0
    """The one that leaves."""
    reason: str | None = field(default=None, metadata={"omit_default": True})


@dataclass(frozen=True, kw_only=True)
class RequestsQueued(Event, name="requests_queued"):
    """The input file of a batch was checked, and all of its requests are in the queue."""

    count: int
