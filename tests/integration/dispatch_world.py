"""Jobs that are processes of this machine: each writes its name to a file when it starts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.runners.processes import ProcessRunner
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore

DEADLINE_S = 120.0


def script(name: str, text: str, **more: Any) -> JobSubmission:
    """A job that runs a shell script."""
    values: dict[str, Any] = {"runner": "process"} | more
    return JobSubmission(kind=JobKind.TRAIN, name=name, spec={"script": text}, **values)


class World:
    """A folder of runs, and the starts of commands in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def command(self, job: Job) -> list[str]:
        text = f'echo {job.run_name} >> "{self.root}/starts"; {job.spec["script"]}'
        return ["/bin/sh", "-c", text, "job"]

    def runner(self) -> ProcessRunner:
        return ProcessRunner(self.root / "runs", self.command, leave_s=20.0)

    def starts(self) -> Counter[str]:
        """Number of times that each attempt was started."""
        path = self.root / "starts"
        return Counter(path.read_text().split()) if path.exists() else Counter()


def rounds_until(dispatcher: Dispatcher, done: Callable[[], bool]) -> None:
    """Rounds of a dispatcher until something holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < deadline, "the dispatcher makes no progress"
        dispatcher.round()
        time.sleep(0.02)


def all_ended(store: JobStore) -> bool:
    return all(job.state.ended for job in store.page(limit=1000).jobs)
