"""Folder jobs in the database: the submission that a job's or sweep's folder stands for, and the run that it tells of.

The id of such a job is a hash of its content (docs/adr/0002-jobs-by-content.md), so it is the same in the folder, in the database
and, with the number of the attempt behind it, on the Ray cluster.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime

import yaml

from tandem.config import worker_counts
from tandem.ids import digest
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.sweep import SweepFolder
from tandem.jobs.work.records import JobSubmission, PastRun, Resources
from tandem.jobs.work.states import JobKind, State
from tandem.observability import codec
from tandem.observability.events import Event, Failed, Finished, Started, Stopped, SweepFinished, SweepStarted

RUNNER = "ray"
_STATES = {
    # The same command starts it, or continues it.
    JobState.NEW: State.PAUSED,
    JobState.STOPPED: State.PAUSED,
    JobState.PENDING: State.RUNNING,
    JobState.RUNNING: State.RUNNING,
    JobState.FINISHED: State.FINISHED,
    JobState.FAILED: State.FAILED,
}

Folder = JobFolder | SweepFolder


def folder_submission(folder: Folder) -> JobSubmission:
    """The submission of a prepared job or sweep."""
    if isinstance(folder, SweepFolder):
        plan = folder.plan()
        return JobSubmission(
            kind=JobKind.SWEEP,
            id=folder.id,
            name=plan.name,
            spec=json.loads((folder.path / "sweep.json").read_text()),
            tenant=_tenant_of_trials(folder),
            content_hash=digest(folder.id),
            runner=RUNNER,
            # Its trials are jobs of their own, with their workers.
            resources=Resources(cpus_per_worker=0.0),
        )
    config = folder.config()
    parallel = config.parallel
    return JobSubmission(
        kind=JobKind.TRAIN,
        id=folder.id,
        name=config.name,
        spec={
            **yaml.safe_load((folder.path / "config.yaml").read_text()),
            "worker_counts": worker_counts(config),
            "workers_per_node": parallel.tensor,
        },
        tenant=config.tenant or "",
        content_hash=digest(folder.id),
        runner=RUNNER,
        parent=None if config.extends is None else config.extends.job,
        resources=Resources(
            cpus_per_worker=parallel.cpus_per_worker,
            gpus_per_worker=parallel.gpus_per_worker,
            min_workers=parallel.min_workers or parallel.workers,
            max_workers=parallel.workers,
        ),
    )


def _tenant_of_trials(sweep: SweepFolder) -> str:
    """All trials have the same; folders of trials may have been deleted."""
    for job in sweep.jobs():
        if (job.path / "config.yaml").exists():
            return job.config().tenant or ""
    return ""


def past_run(folder: Folder, live: JobState | None) -> PastRun:
    """The newest attempt, by the folder's files; `live`: state of its submission on the cluster, None: it is not there.

    An attempt without an end, which is not on the cluster, counts as stopped: the job is paused.
    """
    events, submissions = folder.typed_events(), folder.submissions()
    state = _STATES[_state(folder, live)]
    start = next(_times(events, Started, SweepStarted), None)
    end = next(_times(events[::-1], Finished, Failed, Stopped, SweepFinished), None)
    finished = folder.finished() if state is State.FINISHED else None
    failed = folder.last(Failed) if state is State.FAILED else None
    created_at = _created_at(folder)
    return PastRun(
        state=state,
        attempt=folder.last_attempt(),
        handle=str(submissions[-1]["id"]) if submissions else None,
        created_at=created_at,
        started_at=start,
        ended_at=(end or created_at) if state.ended else None,
        error=None if failed is None else failed.error,
        result=None if finished is None else codec.to_json(finished),
    )


def _state(folder: Folder, live: JobState | None) -> JobState:
    if isinstance(folder, JobFolder):
        return folder.summary(live).state
    if folder.finished():
        return JobState.FINISHED
    if live is not None:
        return live
    if isinstance(folder.last(SweepStarted, Failed), Failed):
        return JobState.FAILED
    return JobState.STOPPED if folder.submissions() else JobState.NEW


def _created_at(folder: Folder) -> datetime:
    name = "sweep.json" if isinstance(folder, SweepFolder) else "config.yaml"
    return datetime.fromtimestamp((folder.path / name).stat().st_mtime, UTC)


def _times(events: list[Event], *kinds: type[Event]) -> Iterator[datetime]:
    for event in events:
        if isinstance(event, kinds) and event.time is not None:
            yield datetime.fromtimestamp(event.time, UTC)
