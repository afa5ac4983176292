"""Batches in the format of OpenAI's API. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tandem.api.openai import batches as wire
from tandem.jobs.work.records import Job, NumberedEvent
from tandem.jobs.work.states import State
from tandem.observability.events import RequestsQueued, StateChanged

PREFIX = "batch_"
STATUSES: Mapping[State, wire.Status] = {
    State.QUEUED: "validating",
    State.HELD: "validating",
    State.STARTING: "validating",
    State.PAUSED: "in_progress",
    State.PAUSING: "in_progress",
    State.PREEMPTING: "in_progress",
    State.RUNNING: "in_progress",
    State.STOPPING: "cancelling",
    State.EXPIRING: "finalizing",
    State.FINISHED: "completed",
    State.FAILED: "failed",
    State.DEAD: "failed",
    State.CANCELLED: "cancelled",
    State.EXPIRED: "expired",
}


def batch_to_wire(job: Job, counts: Mapping[State, int], events: Iterable[NumberedEvent]) -> wire.Batch:
    """A batch; `counts`: numbers of its requests by state, not needed where `has_counts`; `events`: those of its job."""
    events = list(events)
    result = job.result or {}
    status = _status(job, counts, events)
    entered = _first_times(events)
    ended_at = None if job.ended_at is None else int(job.ended_at.timestamp())
    completed = counts.get(State.FINISHED, 0)
    total = result["completed"] + result["failed"] if has_counts(job) else sum(counts.values())
    in_progress_at = entered.get(State.RUNNING)
    return wire.Batch(
        id=job.id,
        endpoint=job.spec["endpoint"],
        errors=wire.BatchErrors.model_validate(result["errors"]) if result.get("errors") else _failure(job, status),
        input_file_id=job.spec["input_file_id"],
        status=status,
        output_file_id=result.get("output_file_id"),
        error_file_id=result.get("error_file_id"),
        created_at=int(job.created_at.timestamp()),
        in_progress_at=in_progress_at if total else None,
        expires_at=None if job.deadline is None else int(job.deadline.timestamp()),
        finalizing_at=ended_at if status in ("completed", "expired") else None,
        completed_at=ended_at if status == "completed" else None,
        failed_at=ended_at if status == "failed" else None,
        expired_at=ended_at if status == "expired" else None,
        cancelling_at=entered.get(State.STOPPING),
        cancelled_at=ended_at if status == "cancelled" else None,
        request_counts=wire.RequestCounts(
            total=total,
            completed=result.get("completed", completed),
            failed=result.get("failed", counts.get(State.FAILED, 0) + counts.get(State.DEAD, 0)),
        ),
        metadata=job.spec.get("metadata"),
        model=job.spec.get("model"),
    )


def has_counts(job: Job) -> bool:
    """Whether the result of a job that has ended has the numbers of its requests."""
    return job.state.ended and {"completed", "failed"} <= (job.result or {}).keys()


def _status(job: Job, counts: Mapping[State, int], events: Iterable[NumberedEvent]) -> wire.Status:
    """The status; a batch whose requests have all ended is `finalizing` until its output is written."""
    is_queued_whole = any(isinstance(numbered.event, RequestsQueued) for numbered in events)
    if job.state is State.RUNNING and is_queued_whole and all(state.ended for state in counts):
        return "finalizing"
    return STATUSES[job.state]


def _failure(job: Job, status: wire.Status) -> wire.BatchErrors | None:
    """The error of a batch that failed without findings about its file."""
    if status != "failed":
        return None
    return wire.BatchErrors(data=[wire.BatchError(code="batch_failed", message=job.error or "The batch failed.")])


def _first_times(events: Iterable[NumberedEvent]) -> dict[State, int]:
    """When a job first entered each state, in seconds since 1970."""
    times: dict[State, int] = {}
    for numbered in events:
        event = numbered.event
        if isinstance(event, StateChanged) and event.time is not None:
            times.setdefault(State(event.to_state), int(event.time))
    return times
