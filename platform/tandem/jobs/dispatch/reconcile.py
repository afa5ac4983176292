"""Reconciliation: the next step for one active job, from its row in the database and what its runner says. Pure.

Every step may be repeated: a dispatcher that dies after a step, and before it is recorded, is followed by one that takes the same
step again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.records import Job
from tandem.jobs.work.states import Action, State, is_legal


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRun:
    """Start the attempt: it is claimed, and not known to run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordStarted:
    """Record the handle of an attempt that runs."""

    handle: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordFinished:
    """Record a result."""

    result: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordFailed:
    """Record a failed attempt."""

    error: str
    retryable: bool
    result: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRun:
    """Ask the attempt to leave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AbandonRun:
    """Keep an attempt from starting that has not started, then record that it is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordStopped:
    """Record that nothing of it runs any more, as was asked."""

    result: Mapping[str, Any] | None = None
    """Of what was done by then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseStopped:
    """Record a job as paused that somebody stopped at its runner."""


Step = PauseStopped | StartRun | RecordStarted | RecordFinished | RecordFailed | StopRun | AbandonRun | RecordStopped


def next_step(job: Job, handle: str | None, status: RunStatus | None) -> Step | None:
    """The step for a job in an active state; None: it runs as it should.

    `handle`: the job's own, or the one that its runner found; None: no run was found. `status`: of that handle; None: the runner
    does not know it.
    """
    match None if status is None else status.state:
        case None if job.handle is None:
            # Claimed, and perhaps started by a dispatcher that died: runners start each attempt once.
            return AbandonRun() if job.state.leaving else StartRun()
        case None:
            if job.state.leaving:
                return RecordStopped()
            return RecordFailed(error=f"The {job.runner} runner does not know {job.handle} any more.", retryable=True)
        case RunState.RUNNING:
            if job.state.leaving:
                return StopRun()
            if job.state is State.STARTING or job.handle is None:
                return RecordStarted(handle=handle or job.run_name)
            return None
        case RunState.FINISHED:
            return RecordFinished(result=status.result if status is not None else None)
        case RunState.STOPPED:
            if job.state.leaving:
                return RecordStopped(result=status.result if status is not None else None)
            # Whoever stopped it, such as `tandem train stop`, did not mean it to start again by itself: its command or `resume`
            # does that.
            return PauseStopped() if is_legal(job.kind, job.state, Action.PAUSE) else _stopped_from_outside(job)
        case RunState.FAILED:
            assert status is not None
            return RecordFailed(
                error=status.error or f"{job.run_name} failed.", retryable=status.retryable, result=status.result
            )


def _stopped_from_outside(job: Job) -> Step:
    return RecordFailed(error=f"{job.run_name} was stopped from outside.", retryable=False)
