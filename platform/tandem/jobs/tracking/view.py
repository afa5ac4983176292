"""Jobs as wire models of the native API. Pure."""

from __future__ import annotations

from datetime import datetime

from tandem.api import jobs as wire
from tandem.jobs.work.records import Job


def job_to_wire(job: Job) -> wire.TandemJob:
    """A job."""
    return wire.TandemJob(
        id=job.id,
        kind=job.kind.value,
        name=job.name,
        tenant=job.tenant,
        state=job.state.value,
        reason=job.reason,
        error=job.error,
        priority=job.priority,
        attempt=job.attempt,
        failures=job.failures,
        max_attempts=job.max_attempts,
        cpus_per_worker=job.resources.cpus_per_worker,
        gpus_per_worker=job.resources.gpus_per_worker,
        min_workers=job.resources.min_workers,
        max_workers=job.resources.max_workers,
        workers=job.workers,
        parent=job.parent,
        created_at=job.created_at.timestamp(),
        started_at=seconds(job.started_at),
        ended_at=seconds(job.ended_at),
        not_before=seconds(job.not_before),
        deadline=seconds(job.deadline),
        result=None if job.result is None else dict(job.result),
    )


def waiting_to_wire(job: Job) -> wire.TandemWaitingJob:
    """A job that waits."""
    return wire.TandemWaitingJob(
        id=job.id,
        kind=job.kind.value,
        name=job.name,
        tenant=job.tenant,
        priority=job.priority,
        reason=job.reason,
        created_at=job.created_at.timestamp(),
        not_before=seconds(job.not_before),
    )


def seconds(time: datetime | None) -> float | None:
    """A time in seconds since 1970."""
    return None if time is None else time.timestamp()
