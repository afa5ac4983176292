"""Fine-tuning jobs, their events and checkpoints in the format of OpenAI's API. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.api.openai import fine_tuning as wire
from tandem.jobs.fine_tuning.progress import RunProgress
from tandem.jobs.fine_tuning.reports import RegisteredCheckpoint, Report, reports
from tandem.jobs.fine_tuning.spec import Method
from tandem.jobs.fine_tuning.stored import hyperparameters_of, spec_of
from tandem.jobs.work.records import Job
from tandem.jobs.work.states import State
from tandem.observability.events import Event, FineTuningPlanned

PREFIX = "ftjob-"
STATUSES: Mapping[State, wire.Status] = {
    State.QUEUED: "queued",
    State.HELD: "queued",
    State.STARTING: "validating_files",
    State.PREEMPTING: "running",
    State.PAUSING: "paused",
    State.PAUSED: "paused",
    State.STOPPING: "cancelled",
    State.CANCELLED: "cancelled",
    State.EXPIRING: "failed",
    State.FINISHED: "succeeded",
    State.FAILED: "failed",
    State.EXPIRED: "failed",
    State.DEAD: "failed",
}
"""Status by the state of a job, but for one that runs."""


def job_to_wire(job: Job, progress: RunProgress) -> wire.FineTuningJob:
    """A job; `progress`: that of its training."""
    creation, spec = wire.FineTuningCreation.model_validate(job.spec["request"]), spec_of(job)
    planned = progress.planned
    status = STATUSES.get(job.state) or ("running" if planned else "validating_files")
    hyperparameters = _chosen(creation, planned)
    failed = status == "failed"
    return wire.FineTuningJob(
        id=job.id,
        created_at=int(job.created_at.timestamp()),
        error=wire.FineTuningError(code="training_failed" if planned else "invalid_training_file", message=_error(job))
        if failed
        else None,
        fine_tuned_model=spec.result if status == "succeeded" else None,
        finished_at=int(job.ended_at.timestamp()) if job.ended_at is not None else None,
        hyperparameters=wire.SupervisedHyperparameters.model_validate(
            hyperparameters.model_dump(include={"batch_size", "learning_rate_multiplier", "n_epochs"})
        ),
        method=_method(spec.method, hyperparameters),
        model=job.spec["model"],
        organization_id=job.tenant,
        result_files=list((job.result or {}).get("result_files", [])),
        seed=spec.seed,
        status=status,
        trained_tokens=(job.result or {}).get("tokens") if status == "succeeded" else None,
        training_file=creation.training_file,
        validation_file=creation.validation_file,
        estimated_finish=_estimated_finish(progress) if status == "running" else None,
        integrations=creation.integrations or [],
        metadata=creation.metadata,
    )


def events_to_wire(job: Job, training: Sequence[Event]) -> list[wire.FineTuningEvent]:
    """All events of a job so far, oldest first; `training`: those of its training."""
    told = [creation_report(job)]
    if job.started_at is not None:
        told.append(start_report(job))
    told += reports(training)
    if (end := end_report(job, len(training))) is not None:
        told.append(end)
    return [report_to_wire(job, report) for report in told]


def creation_report(job: Job) -> Report:
    """The first event of a job."""
    return Report(number=-2, at=job.created_at.timestamp(), level="info", message=f"Created fine-tuning job: {job.id}")


def start_report(job: Job) -> Report:
    """The event of a job's start."""
    started_at = job.started_at or job.created_at
    return Report(number=-1, at=started_at.timestamp(), level="info", message="Validating the files.")


def end_report(job: Job, num_events: int) -> Report | None:
    """The last event of a job that has ended otherwise than by success, of whose training there are `num_events`; else None."""
    if job.ended_at is None or job.state is State.FINISHED:
        return None
    at = job.ended_at.timestamp()
    if job.state is State.CANCELLED:
        return Report(number=num_events, at=at, level="info", message="The job was cancelled.")
    return Report(number=num_events, at=at, level="error", message=_error(job))


def checkpoint_to_wire(job: Job, checkpoint: RegisteredCheckpoint) -> wire.FineTuningCheckpoint:
    """A checkpoint."""
    return wire.FineTuningCheckpoint(
        id=f"ftckpt-{job.id.removeprefix(PREFIX)}-{checkpoint.step:08d}",
        created_at=int(checkpoint.at),
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=job.id,
        metrics=wire.CheckpointMetrics(
            step=checkpoint.step,
            train_loss=checkpoint.train_loss,
            valid_loss=checkpoint.valid_loss,
            full_valid_loss=checkpoint.valid_loss,
        ),
        step_number=checkpoint.step,
    )


def _chosen(creation: wire.FineTuningCreation, planned: FineTuningPlanned | None) -> wire.DpoHyperparameters:
    """The chosen hyperparameters once the files are read, before that the requested ones."""
    requested = hyperparameters_of(creation)
    source: Any = planned or requested
    names = ("batch_size", "learning_rate_multiplier", "n_epochs", "beta")
    return wire.DpoHyperparameters(**{name: getattr(source, name) or "auto" for name in names})


def _method(method: str, chosen: wire.DpoHyperparameters) -> wire.FineTuningMethod:
    if method == Method.DPO:
        return wire.FineTuningMethod(type="dpo", dpo=wire.DpoMethod(hyperparameters=chosen))
    supervised = wire.SupervisedHyperparameters.model_validate(chosen.model_dump(exclude={"beta"}))
    return wire.FineTuningMethod(type="supervised", supervised=wire.SupervisedMethod(hyperparameters=supervised))


def _error(job: Job) -> str:
    return job.error or job.reason or f"The job ended as {job.state.value}."


def _estimated_finish(progress: RunProgress) -> int | None:
    """When the last step is done at the pace of the steps so far, in seconds since 1970."""
    first, last = progress.first_step, progress.last_step
    if first is None or last is None or last.step <= first.step:
        return None
    pace_s = ((last.time or 0.0) - (first.time or 0.0)) / (last.step - first.step)
    return int((last.time or 0.0) + pace_s * (last.steps - last.step))


def report_to_wire(job: Job, report: Report) -> wire.FineTuningEvent:
    """An event."""
    # Numbers from 1 on: the two before the training's own are 0 and 1.
    return wire.FineTuningEvent(
        id=f"ftevent-{job.id.removeprefix(PREFIX)}-{report.number + 2:08d}",
        created_at=int(report.at),
        level=report.level,
        message=report.message,
        type="metrics" if report.metrics else "message",
        data=dict(report.metrics),
    )
