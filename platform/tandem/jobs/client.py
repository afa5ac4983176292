"""Client of a cluster's Ray Jobs API: submit, follow logs, read states, stop."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tandem.cluster.dashboard import ask_dashboard
from tandem.cluster.local import Cluster
from tandem.errors import ClusterError, JobError
from tandem.jobs.folder import JobState, RunFolder
from tandem.observability.events import Event, Failed, Finished, Started, Stopped
from tandem.registry import Registry, RegistryAddress
from tandem.settings import hub_offline, settings

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

T = TypeVar("T")
_STATES = {
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.FINISHED,
    "FAILED": JobState.FAILED,
    "STOPPED": JobState.STOPPED,
}


STOP_MARGIN_S = 10
"""Seconds for a stopped job's work beside the last checkpoint."""

FIRST_ANSWER_S = 2.0
"""Seconds until an address where nobody answers is said to be wrong."""

MAX_RESUBMISSIONS = 3
"""Times that a client that follows a job submits it again after its driver was lost."""


class JobClient:
    """Client of the jobs of one cluster."""

    def __init__(self, cluster: Cluster, registry: RegistryAddress | None = None) -> None:
        """`registry`: the one that jobs use; None: the one that this process's settings name."""
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        self.cluster = cluster
        self._registry = registry
        try:
            self._ray = ask_dashboard(
                cluster.dashboard_url, lambda: JobSubmissionClient(cluster.dashboard_url), FIRST_ANSWER_S
            )
        except RuntimeError as error:
            raise ClusterError(f"The cluster at {cluster.dashboard_url} takes no jobs: {error}") from error

    def _ask(self, request: Callable[[], T]) -> T:
        return ask_dashboard(self.cluster.dashboard_url, request)

    def submit(self, job: RunFolder, *, submission: str | None = None, max_workers: int | None = None) -> str:
        """Submit a prepared job or sweep, unless it runs already; returns the id of the submission.

        `submission`: the id to submit it with, unless the cluster has it already; None: the next one of the job. `max_workers`:
        of an elastic job, until it is submitted again; None: as many as its config says.
        """
        if running := self.running(job):
            return running
        is_given = submission is not None
        submission = submission or f"{job.id}.{job.last_attempt() + 1}"
        python = sys.executable if self.cluster.local else "python"
        variables = {
            "TANDEM_HOME": str(settings().root),
            "PYTHONUNBUFFERED": "1",
            # Seconds until Ray kills a stopped job, which needs some for a last checkpoint.
            "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(job.leave_s) + STOP_MARGIN_S),
        }
        registry = self._registry or Registry.open().address
        if self._registry is not None or settings().database_url:
            variables["TANDEM_DATABASE_URL"] = registry.url
        if max_workers is not None:
            variables["TANDEM_MAX_WORKERS"] = str(max_workers)
        if hub_offline():
            variables["HF_HUB_OFFLINE"] = "1"
        # The driver may run on any node: one that does not see this registry must not create another.
        variables["TANDEM_REGISTRY_ID"] = registry.identity
        runtime_env: dict[str, Any] = {"env_vars": variables}
        if not self.cluster.local:
            # A cluster of other machines may lack Tandem, or have another version.
            runtime_env["py_modules"] = [str(Path(__file__).parents[1])]
        calls = itertools.count()

        def submit() -> None:
            if (is_given or next(calls)) and self._state(submission) is not None:
                return  # a call before this one was received, and its answer lost
            try:
                self._ray.submit_job(
                    entrypoint=f"exec {shlex.quote(python)} -m {job.module} {shlex.quote(str(job.path))}",
                    submission_id=submission,
                    runtime_env=runtime_env,
                    metadata={"tandem_job": job.id},
                )
            except RuntimeError:
                # The dispatcher may have submitted the same attempt at the same time.
                if (state := self._state(submission)) is None or state.over:
                    raise

        self._ask(submit)
        if all(each["id"] != submission for each in job.submissions()):
            job.add_submission(submission, self.cluster.dashboard_url)
        return submission

    def state(self, submission: str) -> JobState | None:
        """State of a submission on the cluster; None if the cluster does not know it."""
        return self._ask(lambda: self._state(submission))

    def known_state(self, submission: str) -> JobState | None:
        """`state`, and ClusterError where the dashboard fails to say: nothing is taken for lost because it is in trouble."""
        try:
            return _STATES[str(self._ask(lambda: self._ray.get_job_status(submission)).value)]
        except RuntimeError as error:
            if "status code 404" in str(error):
                return None
            raise ClusterError(f"Ray's dashboard at {self.cluster.dashboard_url} refused: {error}") from error

    def states(self) -> dict[str, JobState]:
        """States of all submissions that the cluster knows, by their ids; ClusterError where the dashboard fails to say."""
        try:
            found = self._ask(self._ray.list_jobs)
        except RuntimeError as error:
            raise ClusterError(f"Ray's dashboard at {self.cluster.dashboard_url} refused: {error}") from error
        return {info.submission_id: _STATES[str(info.status.value)] for info in found if info.submission_id}

    def _state(self, submission: str) -> JobState | None:
        try:
            return _STATES[str(self._ray.get_job_status(submission).value)]
        except RuntimeError:
            return None

    def log_lines(self, submission: str) -> Iterator[str]:
        """The log so far, line by line."""
        try:
            yield from self._ask(lambda: self._ray.get_job_logs(submission)).splitlines()
        except RuntimeError as error:
            raise JobError(f"The cluster at {self.cluster.dashboard_url} has no log of {submission}.") from error

    def follow(self, submission: str, *, poll_s: float = 0.25) -> Iterator[str]:
        """The log's lines from the first, as they are written, until the job is over.

        Reconnects if the connection breaks, without repeating lines.
        """
        num_yielded = 0
        while True:
            state = self.state(submission)
            num_read = 0
            part = ""
            for chunk in self._read_log_chunks(submission):
                *lines, part = (part + chunk).split("\n")
                for line in lines:
                    num_read += 1
                    if num_read > num_yielded:
                        num_yielded = num_read
                        yield line
            if state is None or state.over:
                if part:
                    yield part
                return
            time.sleep(poll_s)

    def follow_resubmitted(self, job: RunFolder, submission: str) -> Iterator[str]:
        """`follow`, and if driver and supervisor are lost, submit the job again and follow it."""
        for resubmissions in range(MAX_RESUBMISSIONS + 1):
            yield from self.follow(submission)
            if resubmissions == MAX_RESUBMISSIONS or not self.was_killed(job, submission):
                return
            submission = self.submit(job)

    def was_killed(self, job: RunFolder, submission: str) -> bool:
        """Whether a submission was killed: it neither ended by itself nor was stopped by a user."""
        if self.state(submission) is not JobState.FAILED:
            return False
        submissions = job.submissions()
        if submissions and submissions[-1].get("stopped"):
            return False
        # A driver that ends by itself, or on request, has written an event.
        last_event: Event | None = job.last(Started, Finished, Failed, Stopped)
        code = self._info(submission).driver_exit_code
        killed = code is None or code < 0 or code == 128 + signal.SIGKILL
        return killed and (
            last_event is None
            or isinstance(last_event, Started)
            or (last_event.time or 0.0) < (submissions[-1]["time"] if submissions else 0)
        )

    def _read_log_chunks(self, submission: str) -> Iterator[str]:
        """Chunks of the log until it or the connection ends.

        Ray's tail is asynchronous; it runs in a thread, because the caller may run in an event loop (a notebook).
        """
        chunks: queue.Queue[str | None] = queue.Queue()

        async def pump() -> None:
            async for chunk in self._ray.tail_job_logs(submission):
                chunks.put(chunk)

        def run_pump() -> None:
            with contextlib.suppress(Exception):  # the caller checks the job's state after any error
                asyncio.run(pump())
            chunks.put(None)

        threading.Thread(target=run_pump, daemon=True, name=f"tail {submission}").start()
        while (chunk := chunks.get()) is not None:
            yield chunk

    def busy(self) -> bool:
        """Whether any job is pending or running."""
        return any(not _STATES[str(info.status.value)].over for info in self._ask(self._ray.list_jobs))

    def exit_status(self, submission: str) -> int:
        """Exit status of a submission that has ended: the driver's, or 130 if it was stopped."""
        state = self.state(submission)
        if state is JobState.FINISHED:
            return 0
        if state is JobState.STOPPED:
            return 130
        info = self._info(submission)
        return int(info.driver_exit_code or 1)

    def message(self, submission: str) -> str:
        """Ray's message about the end of a submission."""
        return str(self._info(submission).message or "")

    def _info(self, submission: str) -> JobDetails:
        return self._ask(lambda: self._ray.get_job_info(submission))

    def running(self, job: RunFolder) -> str | None:
        """Id of a job's newest submission, if it has not ended on this cluster."""
        submissions = job.submissions()
        if submissions and (state := self.state(submissions[-1]["id"])) and not state.over:
            return str(submissions[-1]["id"])
        return None

    def stop(self, submission: str, *, timeout_s: float = 30.0) -> JobState | None:
        """Stop a submission, and wait up to `timeout_s` until it has ended."""
        with contextlib.suppress(RuntimeError):
            self._ask(lambda: self._ray.stop_job(submission))
        deadline = time.monotonic() + timeout_s
        while (state := self.state(submission)) and not state.over and time.monotonic() < deadline:
            time.sleep(0.2)
        return state
