"""Runner protocol: starts, finds, watches and stops the attempts of jobs in one kind of place.

An attempt has one name, `job.run_name`, in every process that knows the job. A runner starts each name once, however often it is
asked, so that a dispatcher which cannot know whether its predecessor got to start an attempt asks again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from tandem.jobs.work.records import Job


class RunState(StrEnum):
    """State of an attempt, as its runner knows it."""

    RUNNING = "running"
    """It waits for its place there, or runs."""
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    """It ended because it was told to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """What a runner knows of an attempt."""

    state: RunState
    error: str | None = None
    retryable: bool = True
    """Of one that failed: whether another attempt may succeed."""
    result: Mapping[str, Any] | None = None


class Runner(Protocol):
    """One kind of place where jobs run. Calls may take seconds; errors are TandemErrors."""

    def start(self, job: Job) -> str:
        """Start the newest attempt of a job, unless that was done before; returns its handle.

        An error says nothing about whether it runs: ask `find`.
        """

    def find(self, job: Job) -> str | None:
        """The handle of the newest attempt if it was started; None: it was not, as far as the runner knows."""

    def state(self, handle: str) -> RunStatus | None:
        """State of an attempt; None: the runner does not know it any more, because its records are gone."""

    def stop(self, job: Job) -> None:
        """Ask the newest attempt to save and leave, or, where it was not started, keep it from starting. Returns at once.

        It may be asked again; the runner ends what does not leave.
        """
