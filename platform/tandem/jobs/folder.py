"""Folders of jobs and sweeps in TANDEM_HOME: config, events, submissions, results, and the state that follows from them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from tandem.config import TrainConfig, load_yaml
from tandem.errors import JobError, did_you_mean
from tandem.jobs.status import fold_events
from tandem.observability import codec
from tandem.observability.events import Event, Failed, Finished, Started, Step, Stopped
from tandem.settings import settings
from tandem.storage import write_atomic

E = TypeVar("E", bound=Event)


class JobState(StrEnum):
    """State of a job."""

    NEW = "new"
    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def over(self) -> bool:
        """Whether it changes only by a new submission."""
        return self in (JobState.FINISHED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSummary:
    """Summary of a job, as tables of jobs show it."""

    id: str
    state: JobState
    step: int
    steps: int
    loss: float | None
    tokens_per_s: float | None
    model: str | None
    """The registered id of the result."""
    error: str | None
    submitted_at: float | None
    """Seconds since 1970."""
    workers: int | None = None
    """Of the newest start."""
    layout: str | None = None
    checkpoint: int | None = None
    """Step of the newest checkpoint."""
    checkpoint_at: float | None = None
    """When it was written, in seconds since 1970."""
    faults: dict[str, int] = field(default_factory=dict)
    """Faults so far by kind: worker, node, hang, controller, driver. A job that runs or has finished survived them."""
    restarts: int = 0
    repeated_steps: int = 0
    """Steps that restarts computed a second time."""
    skipped_steps: int = 0
    """Steps that were not taken, because loss or gradients were not finite."""
    warnings: list[str] = field(default_factory=list)
    """The newest messages for the user: slow ranks, rollbacks, notices."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Folder of a job or of a sweep. It holds everything that outlives the cluster."""

    path: Path
    module: ClassVar[str]
    """Module that the cluster runs, as `python -m MODULE PATH`."""

    @property
    def id(self) -> str:
        """The id, which is the folder's name."""
        return self.path.name

    @property
    def leave_s(self) -> float:
        """Seconds that it may take to save and exit when it is told to stop."""
        return 0.0

    def events(self) -> list[dict[str, Any]]:
        """The JSON objects of all events so far, oldest first."""
        return list(codec.read(self.path / "events.jsonl"))

    def typed_events(self) -> list[Event]:
        """All events so far, oldest first, of the kinds that this release knows."""
        return list(codec.read_events(self.path / "events.jsonl"))

    def last(self, *kinds: type[E]) -> E | None:
        """The newest event of one of these kinds."""
        return next((event for event in reversed(self.typed_events()) if isinstance(event, kinds)), None)

    def submissions(self) -> list[dict[str, Any]]:
        """All submissions to clusters, oldest first: {id, dashboard_url, time, stopped?}."""
        try:
            submissions = json.loads((self.path / "submissions.json").read_text())
        except FileNotFoundError:
            return []
        return [s for s in submissions if isinstance(s, dict)] if isinstance(submissions, list) else []

    def last_attempt(self) -> int:
        """Number of the newest submission, which ends its id; 0: there was none."""
        submissions = self.submissions()
        number = str(submissions[-1]["id"]).rpartition(".")[2] if submissions else "0"
        return int(number) if number.isdecimal() else len(submissions)

    def add_submission(self, submission_id: str, dashboard_url: str) -> None:
        """Record a submission to a cluster."""
        entry = {"id": submission_id, "dashboard_url": dashboard_url, "time": time.time()}
        write_atomic(self.path / "submissions.json", json.dumps([*self.submissions(), entry], indent=1))

    def mark_stopped(self) -> None:
        """Record that a user stopped the newest submission."""
        if submissions := self.submissions():
            submissions[-1]["stopped"] = True
            write_atomic(self.path / "submissions.json", json.dumps(submissions, indent=1))


@dataclass(frozen=True, slots=True)
class JobFolder(RunFolder):
    """The folder of one job."""

    module: ClassVar[str] = "tandem.train.supervision.supervisor"

    @property
    def leave_s(self) -> float:
        """See `RunFolder`."""
        return self.config().faults.leave_s

    @property
    def export(self) -> Path:
        """Folder of the trained model or adapter."""
        return self.path / "export"

    @property
    def plot(self) -> Path:
        """Plot of the loss."""
        return self.path / "loss.png"

    def config(self) -> TrainConfig:
        """The job's config, with data and base resolved."""
        return load_yaml(TrainConfig, self.path / "config.yaml")

    def finished(self) -> Finished | None:
        """The event of the job's end, if it succeeded, the export exists and is registered as configured."""
        end: Event | None = self.last(Finished, Failed, Started)
        if not isinstance(end, Finished) or not self.export.is_dir():
            return None
        return end if end.model or not self.config().register else None

    def summary(self, live: JobState | None = None) -> JobSummary:
        """The job's summary by its files; `live`, the cluster's state of its newest submission, wins while it runs."""
        status, submissions = fold_events(self.typed_events()), self.submissions()
        end = status.last_end
        if self.finished():
            state = JobState.FINISHED
        elif live is not None:
            state = live
        elif (submissions and submissions[-1].get("stopped")) or isinstance(end, Stopped):
            state = JobState.STOPPED
        elif isinstance(end, Failed):
            state = JobState.FAILED
        else:
            # Without an end in the journal and on no cluster: it ended with its cluster.
            state = JobState.STOPPED if submissions else JobState.NEW
        step = status.last_step or Step(step=0)
        return JobSummary(
            id=self.id,
            state=state,
            step=step.step,
            steps=step.steps or self.config().steps,
            loss=step.loss,
            tokens_per_s=step.tokens_per_s,
            model=end.model if isinstance(end, Finished) and state is JobState.FINISHED else None,
            error=end.error if isinstance(end, Failed) and state is JobState.FAILED else None,
            submitted_at=submissions[-1]["time"] if submissions else None,
            workers=status.workers,
            layout=status.layout,
            checkpoint=status.checkpoint,
            checkpoint_at=status.checkpoint_at,
            faults=dict(status.faults),
            restarts=status.restarts,
            repeated_steps=status.repeated_steps,
            skipped_steps=status.skipped_steps,
            warnings=list(status.warnings),
        )


def job_folders() -> Iterator[JobFolder]:
    """All jobs in TANDEM_HOME, newest first."""
    jobs = settings().jobs_dir
    if jobs.is_dir():
        folders = [p for p in jobs.iterdir() if (p / "config.yaml").exists()]
        for path in sorted(folders, key=lambda p: (p / "config.yaml").stat().st_mtime, reverse=True):
            yield JobFolder(path)


def find_job(job_id: str) -> JobFolder:
    """The job of that id, or of the only id with that prefix; JobError with the nearest id otherwise."""
    jobs = list(job_folders())
    if job_id == "latest" and jobs:
        return jobs[0]
    matches = [job for job in jobs if job.id == job_id] or [job for job in jobs if job.id.startswith(job_id)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise JobError(
            f"{job_id!r} could be {len(matches)} jobs: {', '.join(j.id for j in matches[:5])}. Say more of it."
        )
    hint = did_you_mean(job_id, [job.id for job in jobs])
    raise JobError(f"No job {job_id!r} in {settings().jobs_dir}.{hint} `tandem train status` lists them.")
