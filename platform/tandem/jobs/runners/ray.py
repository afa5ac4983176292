"""Runner of training jobs and sweeps as Ray Jobs.

The submission id is the name of the attempt, and a Ray cluster takes each id once: an attempt that a dispatcher submitted before
it died is found by its id, and is not started a second time. The log of an attempt that has ended is copied into the job's
folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tandem.errors import JobError, TandemError, sentence
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.fine_tuning.folder import training_folder
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.sweep import SweepFolder
from tandem.jobs.tracking.logs import LogSource, keep_log
from tandem.jobs.work.records import Job, split_run_name
from tandem.jobs.work.states import JobKind
from tandem.observability import codec
from tandem.observability.events import Failed
from tandem.settings import settings

Folder = JobFolder | SweepFolder

log = logging.getLogger(__name__)


class RayRunner:
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are Ray's submission ids."""

    def __init__(self, client: Callable[[], JobClient]) -> None:
        """`client`: of the cluster as it is now; ClusterError where there is none."""
        self._client = client

    def start(self, job: Job) -> str:
        """See `Runner`. A submission of the same job that runs already, by command, counts as this attempt."""
        try:
            is_elastic = job.resources.max_workers > job.resources.min_workers
            return self._client().submit(
                self._folder(job.id, job.kind),
                submission=job.run_name,
                max_workers=job.workers if is_elastic else None,
            )
        except RuntimeError as error:
            raise JobError(
                f"Ray did not take {job.run_name}: {sentence(str(error))} Its dashboard's log says more."
            ) from error

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        return job.run_name if self._client().known_state(job.run_name) is not None else None

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`."""
        client = self._client()
        folder = self._folder(split_run_name(handle)[0])
        match client.known_state(handle):
            case None | JobState.NEW:
                return None
            case JobState.PENDING | JobState.RUNNING:
                return RunStatus(state=RunState.RUNNING)
            case JobState.STOPPED:
                keep_attempt_log(client, folder, handle)
                return RunStatus(state=RunState.STOPPED)
            case JobState.FINISHED:
                keep_attempt_log(client, folder, handle)
                end = folder.finished()
                return RunStatus(state=RunState.FINISHED, result=None if end is None else codec.to_json(end))
            case JobState.FAILED:
                keep_attempt_log(client, folder, handle)
                # A driver that ends by itself says why; its own supervision has tried again what was worth it.
                was_killed = client.was_killed(folder, handle)
                failed = folder.last(Failed)
                error = client.message(handle) if was_killed or failed is None else failed.error
                return RunStatus(state=RunState.FAILED, error=error, retryable=was_killed)

    def stop(self, job: Job) -> None:
        """See `Runner`. Ray ends a driver that does not leave in the time of `faults.leave_s`."""
        self._client().stop(job.handle or job.run_name, timeout_s=0.0)
        self._folder(job.id, job.kind).mark_stopped()

    def _folder(self, job_id: str, kind: JobKind | None = None) -> Folder:
        """The folder of a job or sweep; ids of sweeps contain `-sweep-`."""
        if kind not in (None, JobKind.TRAIN, JobKind.SWEEP):
            raise JobError(f"{job_id} is of kind {kind}, and the Ray runner runs train and sweep. Name another runner.")
        sweep = SweepFolder(settings().sweeps_dir / job_id)
        if kind is JobKind.SWEEP or (kind is None and sweep.path.is_dir()):
            return sweep
        return training_folder(job_id)


def keep_attempt_log(client: LogSource, folder: Folder, handle: str) -> None:
    """Copy the log of an attempt that has ended into the job's folder. The end counts without it."""
    attempt = split_run_name(handle)[1]
    if not attempt.isdecimal():
        return
    try:
        keep_log(folder.path, int(attempt), lambda: client.log_lines(handle))
    except TandemError as error:
        log.warning("The log of %s was not kept: %s", handle, error)
