"""Runner whose attempts are entries in memory, for tests and simulations: whoever holds it says when each ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.work.records import Job


class MemoryRunner:
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are the attempts' names."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        """Jobs as they were started, by the names of their attempts."""
        self.leaving: set[str] = set()
        """Attempts that were told to leave, and have not."""
        self._ends: dict[str, RunStatus] = {}

    @property
    def running(self) -> dict[str, Job]:
        """Jobs whose attempts have not ended, by their names."""
        return {name: job for name, job in self.jobs.items() if name not in self._ends}

    def start(self, job: Job) -> str:
        """See `Runner`."""
        self.jobs.setdefault(job.run_name, job)
        return job.run_name

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        return job.run_name if job.run_name in self.jobs or job.run_name in self._ends else None

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`."""
        if handle in self._ends:
            return self._ends[handle]
        return RunStatus(state=RunState.RUNNING) if handle in self.jobs else None

    def stop(self, job: Job) -> None:
        """See `Runner`. An attempt that runs goes on until `leave`."""
        if job.run_name in self._ends:
            return
        if job.run_name in self.jobs:
            self.leaving.add(job.run_name)
        else:
            self._ends[job.run_name] = RunStatus(state=RunState.STOPPED)

    def leave(self) -> None:
        """End all attempts that were told to leave."""
        for name in sorted(self.leaving):
            self._end(name, RunStatus(state=RunState.STOPPED))

    def finish(self, name: str, result: Mapping[str, Any] | None = None) -> None:
        """End an attempt with a result."""
        self._end(name, RunStatus(state=RunState.FINISHED, result=result))

    def fail(self, name: str, error: str, *, retryable: bool = True) -> None:
        """End an attempt with an error."""
        self._end(name, RunStatus(state=RunState.FAILED, error=error, retryable=retryable))

    def _end(self, name: str, status: RunStatus) -> None:
        self._ends.setdefault(name, status)
        self.leaving.discard(name)
