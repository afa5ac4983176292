"""Folder jobs in the database: the submission that a job's or sweep's folder stands for, and the import of those of before.

The id of such a job is a hash of its content (docs/adr/0002-jobs-by-content.md), so it is the same in the folder, in the database
and, with the number of the attempt behind it, on the Ray cluster.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from tandem.config import worker_counts
from tandem.errors import TandemError
from tandem.ids import digest
from tandem.jobs.folder import JobFolder, JobState, RunFolder, job_folders
from tandem.jobs.sweep import SweepFolder, sweep_folders
from tandem.jobs.work.records import JobSubmission, PastRun, Resources
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore
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

log = logging.getLogger(__name__)

Live = Callable[[RunFolder], JobState | None]
"""State of a folder's newest submission on the cluster; None: it is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Result of an import."""

    added: int
    known: int
    """Jobs that were in the database already: they are left as they are."""
    unreadable: tuple[Path, ...]
    """Folders whose files this release cannot read."""


def import_folders(store: JobStore, live: Live = lambda _: None) -> Imported:
    """Record the jobs and sweeps in TANDEM_HOME, oldest first, each once.

    Without `live` those that have not ended count as stopped: they are paused. With it, those that run on the cluster are
    recorded as running, and the dispatcher adopts them.
    """
    added, known = 0, 0
    unreadable: list[Path] = []
    folders: list[JobFolder | SweepFolder] = [*job_folders(), *sweep_folders()]
    for folder in sorted(folders, key=_created_at):
        try:
            is_new = store.record(folder_submission(folder), _past_run(folder, live(folder)))
        except (TandemError, OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s was not imported: %s", folder.path, error)
            unreadable.append(folder.path)
            continue
        added, known = added + is_new, known + (not is_new)
    return Imported(added=added, known=known, unreadable=tuple(unreadable))


def folder_submission(folder: JobFolder | SweepFolder) -> JobSubmission:
    """The submission of a prepared job or sweep."""
    if isinstance(folder, SweepFolder):
        plan = folder.plan()
        return JobSubmission(
            kind=JobKind.SWEEP,
            id=folder.id,
            name=plan.name,
            spec=json.loads((folder.path / "sweep.json").read_text()),
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
        content_hash=digest(folder.id),
        runner=RUNNER,
        resources=Resources(
            cpus_per_worker=parallel.cpus_per_worker,
            gpus_per_worker=parallel.gpus_per_worker,
            min_workers=parallel.min_workers or parallel.workers,
            max_workers=parallel.workers,
        ),
    )


def _past_run(folder: JobFolder | SweepFolder, live: JobState | None) -> PastRun:
    events, submissions = folder.typed_events(), folder.submissions()
    state = _STATES[_state(folder, live)]
    start = next(_times(events, Started, SweepStarted), None)
    end = next(_times(events[::-1], Finished, Failed, Stopped, SweepFinished), None)
    finished = folder.finished() if state is State.FINISHED else None
    failed = folder.last(Failed) if state is State.FAILED else None
    created_at = _created_at(folder)
    return PastRun(
        state=state,
        attempt=len(submissions),
        handle=str(submissions[-1]["id"]) if submissions else None,
        created_at=created_at,
        started_at=start,
        ended_at=(end or created_at) if state.ended else None,
        error=None if failed is None else failed.error,
        result=None if finished is None else codec.to_json(finished),
        events=tuple(events),
    )


def _state(folder: JobFolder | SweepFolder, live: JobState | None) -> JobState:
    if isinstance(folder, JobFolder):
        return folder.summary(live).state
    if folder.finished():
        return JobState.FINISHED
    if live is not None:
        return live
    if isinstance(folder.last(SweepStarted, Failed), Failed):
        return JobState.FAILED
    return JobState.STOPPED if folder.submissions() else JobState.NEW


def _created_at(folder: JobFolder | SweepFolder) -> datetime:
    name = "sweep.json" if isinstance(folder, SweepFolder) else "config.yaml"
    return datetime.fromtimestamp((folder.path / name).stat().st_mtime, UTC)


def _times(events: list[Event], *kinds: type[Event]) -> Iterator[datetime]:
    for event in events:
        if isinstance(event, kinds) and event.time is not None:
            yield datetime.fromtimestamp(event.time, UTC)
