"""Jobs of the store as the scheduler's records. Pure.

A job's `spec` may have `scheduling` (`config.scheduling.JobSchedulingConfig`), and, of jobs that are elastic or tensor-parallel,
`worker_counts` and `workers_per_node`; the kind of the job writes them when it submits it.
"""

from __future__ import annotations

from tandem.config import JobSchedulingConfig, SchedulingConfig, from_dict
from tandem.errors import ConfigError
from tandem.jobs.dispatch.history import RunHistory
from tandem.jobs.scheduling import records
from tandem.jobs.scheduling.resources import Resources
from tandem.jobs.work.records import Job
from tandem.jobs.work.states import TRANSITIONS, Action, JobKind, State

CHECKPOINT_S = 30.0
"""Seconds that a checkpoint on demand takes."""


def worker_of(job: Job) -> Resources:
    """What one worker of a job needs; nothing for jobs whose work is done elsewhere, such as batches and sweeps."""
    return Resources(job.resources.cpus_per_worker, job.resources.gpus_per_worker)


def request_of(job: Job, history: RunHistory, config: SchedulingConfig) -> records.Job:
    """What a job asks of the scheduler. ConfigError where its priority class, time limit or workers are impossible here."""
    asked = from_dict(JobSchedulingConfig, job.spec.get("scheduling") or {})
    need = job.resources
    counts = job.spec.get("worker_counts") or range(need.min_workers, need.max_workers + 1)
    try:
        return records.Job(
            id=job.id,
            tenant=job.tenant,
            worker=worker_of(job),
            worker_counts=tuple(sorted(int(count) for count in counts)),
            workers_per_node=int(job.spec.get("workers_per_node") or 1),
            # The store's numbers are lower for more urgent jobs.
            priority=config.level(asked.priority) - job.priority,
            submitted_s=job.created_at.timestamp(),
            time_limit_s=None if asked.time_limit is None else config.time_limit_s(asked.time_limit),
            preemptible=asked.preemptible and _can_be_preempted(job.kind),
            checkpoint_cost_s=CHECKPOINT_S if _has_checkpoints(job.kind) else None,
            ran_s=history.ran_s,
            preemptions=history.preemptions,
        )
    except ValueError as error:
        raise ConfigError(f"{error} Correct the job's workers, and submit it again.") from error


def _can_be_preempted(kind: JobKind) -> bool:
    return (State.RUNNING, Action.PREEMPT) in TRANSITIONS[kind]


def _has_checkpoints(kind: JobKind) -> bool:
    """Kinds without checkpoints cannot be paused."""
    return (State.RUNNING, Action.PAUSE) in TRANSITIONS[kind]
