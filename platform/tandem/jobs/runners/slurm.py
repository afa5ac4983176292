"""Runner of training jobs as Slurm jobs, each on a Ray cluster of its own (`tandem.cluster.slurm`).

The Slurm job has the attempt's name, `ID.ATTEMPT`, and its folder below TANDEM_HOME too. A lock in that folder, and Slurm's own
list, make sure that each name is submitted once. Slurm queues the job again after its time limit or the failure of a node: that
is the same attempt, which goes on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from datetime import datetime

from tandem.cluster.slurm import commands
from tandem.cluster.slurm.commands import JobState
from tandem.cluster.slurm.folder import LEAVE_FILE, Submission
from tandem.cluster.slurm.folder import JobFolder as SlurmFolder
from tandem.cluster.slurm.submission import make_request, write_files
from tandem.config.slurm import SlurmSite
from tandem.errors import JobError, TandemError
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.fine_tuning.folder import training_folder
from tandem.jobs.folder import JobFolder
from tandem.jobs.tracking.logs import keep_log
from tandem.jobs.work.records import Job, split_run_name
from tandem.jobs.work.states import JobKind
from tandem.observability import codec
from tandem.observability.events import Failed
from tandem.private import make_private_folder
from tandem.settings import settings

STOP_MARGIN_S = 60.0
"""Seconds for a job's end beside its last checkpoint, after which it is cancelled."""
_HOPELESS = frozenset({"OUT_OF_MEMORY", "DEADLINE"})
"""Another attempt would end in the same way."""


class SlurmRunner:
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are the names of the attempts."""

    def __init__(self, site: Callable[[], SlurmSite]) -> None:
        """`site`: as it is configured now."""
        self._site = site

    def start(self, job: Job) -> str:
        """See `Runner`. ClusterError with Slurm's own words where it refuses the job."""
        if job.kind is not JobKind.TRAIN:
            raise JobError(f"{job.id} is of kind {job.kind}, and the Slurm runner runs train. Name another runner.")
        with _locked(job.run_name) as folder:
            if not (folder.path / LEAVE_FILE).exists() and _job_id(folder) is None:
                self._submit(job, folder)
        return job.run_name

    def _submit(self, job: Job, folder: SlurmFolder) -> None:
        site, found = self._site(), settings()
        submission = Submission(
            kind="train",
            command=("slurm", "attempt", job.id),
            nodes=int(job.spec.get("nodes") or 1),
            gpus_per_node=int(job.spec.get("gpus_per_node") or 0),
            time=site.time,
        )
        SlurmFolder.create(found.root, submission, job.run_name)
        write_files(make_request(submission, folder, site), site)
        folder.write_job_id(commands.submit(folder.script, [f"--job-name={job.run_name}"]))

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        folder = _folder(job.run_name)
        return job.run_name if (folder.path / LEAVE_FILE).exists() or _job_id(folder) is not None else None

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`."""
        folder = _folder(handle)
        job_id, was_stopped = _job_id(folder), (folder.path / LEAVE_FILE).exists()
        if job_id is None:
            return RunStatus(state=RunState.STOPPED) if was_stopped else None
        training = training_folder(split_run_name(handle)[0])
        slurm = commands.state(job_id) or commands.past_state(job_id)
        status = status_of(slurm, training, since=_submitted_at(folder), was_stopped=was_stopped)
        if status is not None and status.state is not RunState.RUNNING:
            attempt = split_run_name(handle)[1]
            with contextlib.suppress(TandemError, OSError):
                keep_log(training.path, int(attempt), lambda: folder.log.read_text(errors="replace").splitlines())
        return status

    def stop(self, job: Job) -> None:
        """See `Runner`. A job that waits is cancelled; one that runs gets the signal that precedes its time limit."""
        with _locked(job.run_name) as folder:
            asked = folder.path / LEAVE_FILE
            is_first = not asked.exists()
            if is_first:
                asked.touch()
            job_id = _job_id(folder)
            slurm = None if job_id is None else commands.state(job_id)
            if job_id is None or slurm is None or slurm.is_over:
                return
            leave_s = training_folder(job.id).leave_s + STOP_MARGIN_S
            if slurm.waits or time.time() - asked.stat().st_mtime > leave_s:
                commands.cancel(job_id)
            elif is_first:
                commands.warn(job_id)


def status_of(slurm: JobState | None, training: JobFolder, *, since: float, was_stopped: bool) -> RunStatus | None:
    """What Slurm's state of an attempt means; None: nobody knows. `since`: time of its submission, in seconds since 1970."""
    if slurm is not None and not slurm.is_over:
        return RunStatus(state=RunState.RUNNING)
    if (end := training.finished()) is not None:
        return RunStatus(state=RunState.FINISHED, result=codec.to_json(end))
    if was_stopped or (slurm is not None and slurm.state == "CANCELLED"):
        return RunStatus(state=RunState.STOPPED)
    failed = training.last(Failed)
    if failed is not None and (failed.time or 0.0) >= since:
        # A driver that ends by itself says why; its own supervision has tried again what was worth it.
        return RunStatus(state=RunState.FAILED, error=failed.error, retryable=False)
    if slurm is None:
        return None
    reason = f" ({slurm.reason})" if slurm.reason else ""
    return RunStatus(
        state=RunState.FAILED,
        error=f"Slurm's job {slurm.job_id} ended as {slurm.state}{reason}, with exit status {slurm.exit_status}.",
        retryable=slurm.state not in _HOPELESS,
    )


def _job_id(folder: SlurmFolder) -> str | None:
    """Slurm's id of an attempt's job; found by its name where a dispatcher died before it wrote the id down."""
    if not (folder.path / "submission.json").exists():
        return None
    if (known := folder.submission().job_id) is not None:
        return known
    if (found := commands.find_job(folder.name)) is not None:
        folder.write_job_id(found)
    return found


def _submitted_at(folder: SlurmFolder) -> float:
    return datetime.fromisoformat(folder.submission().submitted_at).timestamp()


def _folder(run_name: str) -> SlurmFolder:
    return SlurmFolder(settings().root / "slurm" / run_name)


@contextlib.contextmanager
def _locked(run_name: str) -> Iterator[SlurmFolder]:
    """The folder of an attempt, which no other dispatcher starts or stops meanwhile."""
    folder = _folder(run_name)
    make_private_folder(folder.path)
    lock = os.open(folder.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        raise JobError(f"Another dispatcher is starting or stopping {run_name}. It is tried again.") from error
    finally:
        os.close(lock)
