"""The folder of a job, or of a sweep of jobs, in TANDEM_HOME: its events and where it was submitted, and what these add up to."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from tandem.config import TrainConfig, load_yaml
from tandem.errors import JobError, did_you_mean
from tandem.observability import events
from tandem.settings import settings
from tandem.storage import write_atomic


class JobState(StrEnum):
    """Where a job stands."""

    NEW = "new"
    PENDING = "pending"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def over(self) -> bool:
        """Whether it can change no more without a new submission."""
        return self in (JobState.FINISHED, JobState.FAILED, JobState.STOPPED)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobSummary:
    """What a table of jobs shows of one."""

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
    """Of the newest start; the config's until there is one."""
    layout: str | None = None
    checkpoint: int | None = None
    """Step of the newest checkpoint."""
    checkpoint_at: float | None = None
    """When it was written, in seconds since 1970."""
    faults: dict[str, int] = field(default_factory=dict)
    """Faults so far, by kind: worker, node, hang, controller, driver. What runs or has finished has survived them."""
    restarts: int = 0
    repeated_steps: int = 0
    """Steps that were computed twice for them."""
    skipped_steps: int = 0
    """Steps that were left out since they were not finite."""
    warnings: list[str] = field(default_factory=list)
    """The newest of what a person should know: slow ranks, rollbacks, notices."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What the folders of a job and of a sweep have in common; all that outlives the cluster is in them."""

    path: Path
    module: ClassVar[str]
    """What runs on the cluster, as `python -m MODULE PATH`."""

    @property
    def id(self) -> str:
        """The id, which is the folder's name."""
        return self.path.name

    @property
    def leave_s(self) -> float:
        """Seconds that it may take to leave when it is told to stop."""
        return 0.0

    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first."""
        return list(events.read(self.path / "events.jsonl"))

    def last(self, *names: str) -> dict[str, Any] | None:
        """The newest event of one of these names."""
        return next((e for e in reversed(self.events()) if e["event"] in names), None)

    def submissions(self) -> list[dict[str, Any]]:
        """Each time it was sent to a cluster: {id, dashboard_url, time, stopped?}."""
        try:
            found = json.loads((self.path / "submissions.json").read_text())
        except FileNotFoundError:
            return []
        return [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []

    def add_submission(self, submission_id: str, dashboard_url: str) -> None:
        """Write down that it was sent to a cluster."""
        entry = {"id": submission_id, "dashboard_url": dashboard_url, "time": time.time()}
        write_atomic(self.path / "submissions.json", json.dumps([*self.submissions(), entry], indent=1))

    def mark_stopped(self) -> None:
        """Write down that the newest submission was stopped by a person."""
        if known := self.submissions():
            known[-1]["stopped"] = True
            write_atomic(self.path / "submissions.json", json.dumps(known, indent=1))


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
        """Where the trained model or adapter lies."""
        return self.path / "export"

    @property
    def plot(self) -> Path:
        """The loss curve."""
        return self.path / "loss.png"

    def config(self) -> TrainConfig:
        """The job's config, with data and base resolved."""
        return load_yaml(TrainConfig, self.path / "config.yaml")

    def finished(self) -> dict[str, Any] | None:
        """The `finished` event, if the job ended well, its result is still there, and is registered if it should be."""
        end = self.last("finished", "failed", "started")
        if end is None or end["event"] != "finished" or not self.export.is_dir():
            return None
        return end if end.get("model") or not self.config().register else None

    def summary(self, live: JobState | None = None) -> JobSummary:
        """The job as its files tell it; `live`, what the cluster says of its newest submission, wins while it runs."""
        known, sent = self.events(), self.submissions()
        sent_at = sent[-1]["time"] if sent else None
        last_step: dict[str, Any] = next((e for e in reversed(known) if e["event"] == "step"), {})
        end = next((e for e in reversed(known) if e["event"] in ("finished", "failed", "stopped", "started")), None)
        if self.finished():
            state = JobState.FINISHED
        elif live is not None:
            state = live
        elif (sent and sent[-1].get("stopped")) or (end and end["event"] == "stopped"):
            state = JobState.STOPPED
        elif end and end["event"] == "failed":
            state = JobState.FAILED
        else:
            # Nothing says how it ended, and no cluster knows it: it went with its cluster.
            state = JobState.STOPPED if sent else JobState.NEW
        return JobSummary(
            id=self.id,
            state=state,
            step=int(last_step.get("step", 0)),
            steps=int(last_step.get("steps", 0)) or self.config().steps,
            loss=last_step.get("loss"),
            tokens_per_s=last_step.get("tokens_per_s"),
            model=end.get("model") if end and state is JobState.FINISHED else None,
            error=end.get("error") if end and state is JobState.FAILED else None,
            submitted_at=sent_at,
            **summarize_health(known),
        )


WARNINGS_SHOWN = 5


def summarize_health(known: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What a job's events tell of how it fares: the later fields of a `JobSummary`."""
    found: dict[str, Any] = {"workers": None, "layout": None, "checkpoint": None, "checkpoint_at": None}
    faults: Counter[str] = Counter()
    restarts = repeated = skipped = newest = 0
    warnings: list[str] = []
    started = False
    for event in known:
        match event["event"]:
            case "started":
                found |= {"workers": event.get("workers"), "layout": event.get("layout")}
                # A driver that came after another one starts as if it were the first.
                restarts += started
                repeated += max(0, newest - (event.get("resumed_from") or 0)) if started else 0
                started = True
            case "resized":
                found |= {"workers": event["to"], "layout": event.get("layout")}
            case "restart":
                restarts += 1
                repeated += max(0, newest - (event.get("resumed_from") or 0))
            case "step":
                newest = event["step"]
            case "checkpoint":
                found |= {"checkpoint": event["step"], "checkpoint_at": event.get("time")}
            case "fault":
                faults[str(event["kind"])] += 1
            case "skipped":
                skipped += 1
                warnings.append(str(event["reason"]))
            case "slow" | "rollback":
                warnings.append(str(event["reason"]))
            case "notice":
                warnings.append(str(event["message"]))
    return {
        **found, "faults": dict(faults), "restarts": restarts, "repeated_steps": repeated, "skipped_steps": skipped,
        "warnings": warnings[-WARNINGS_SHOWN:],
    }  # fmt: skip


def job_folders() -> Iterator[JobFolder]:
    """Every job of this home, newest first."""
    jobs = settings().jobs_dir
    if jobs.is_dir():
        found = [p for p in jobs.iterdir() if (p / "config.yaml").exists()]
        for path in sorted(found, key=lambda p: (p / "config.yaml").stat().st_mtime, reverse=True):
            yield JobFolder(path)


def find_job(job_id: str) -> JobFolder:
    """The job of that id, or of the only id that starts so; JobError with the nearest id otherwise."""
    known = list(job_folders())
    if job_id == "latest" and known:
        return known[0]
    matches = [job for job in known if job.id == job_id] or [job for job in known if job.id.startswith(job_id)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise JobError(
            f"{job_id!r} could be {len(matches)} jobs: {', '.join(j.id for j in matches[:5])}. Say more of it."
        )
    near = did_you_mean(job_id, [job.id for job in known])
    raise JobError(f"No job {job_id!r} in {settings().jobs_dir}.{near} `tandem train status` lists them.")
