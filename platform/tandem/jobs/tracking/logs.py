"""Logs of a job's runs: of the attempt that runs from the cluster, of those before from the copy in the job's folder.

A run's log belongs to its Ray cluster and goes with it. The runner copies it into the job's folder when the attempt ends
(`keep_log`), so that it can be read after the cluster is gone. Of an attempt whose cluster ended before, no log is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tandem.api import jobs as wire
from tandem.errors import UnknownLogError
from tandem.jobs.tracking.feeds import Chunk
from tandem.jobs.tracking.history import folder_of
from tandem.jobs.tracking.line_file import START, Line, lines_after
from tandem.jobs.work.records import Job
from tandem.storage import write_atomic

PAGE = 1000


class LogSource(Protocol):
    """Where logs of runs that have not ended are read, as `tandem.jobs.client.JobClient` is."""

    def log_lines(self, submission: str) -> Iterable[str]:
        """The log so far, line by line. JobError where there is none, ClusterError where the cluster does not answer."""
        ...


def log_path(folder: Path, attempt: int) -> Path:
    """The copy of the log of an attempt that has ended."""
    return folder / "logs" / f"attempt-{attempt}.log"


def keep_log(folder: Path, attempt: int, read: Callable[[], Iterable[str]]) -> None:
    """Copy the log of an attempt into the job's folder, unless it is there. Raises StorageError, and what `read` raises."""
    path = log_path(folder, attempt)
    if not path.exists():
        write_atomic(path, "".join(f"{line}\n" for line in read()), mode=0o600)


@dataclass(slots=True)
class LogFeed:
    """Lines of the log of one attempt, until the attempt has ended."""

    find: Callable[[], Job]
    """The job as it is now."""
    source: Callable[[], LogSource] | None
    """Of the cluster that jobs run on; None: of no cluster, and only copies can be read."""
    attempt: int | None
    """None: the newest one, which may not have started yet."""
    after: int
    """Number of the last line that was read."""
    _line: Line = START
    _opened: LogSource | None = None
    """Kept from one call to the next: a client of a cluster asks for its version first."""

    def next(self) -> Chunk[wire.TandemLogLine]:
        """See `Feed`. UnknownLogError where there is none, ClusterError where the cluster does not answer."""
        job = self.find()
        folder = folder_of(job)
        if folder is None:
            raise UnknownLogError(f"{job.id} is of kind {job.kind}, which has no log. Its events tell of it.")
        attempt = self.attempt or job.attempt
        if attempt > job.attempt:
            raise UnknownLogError(f"{job.id} has no attempt {attempt}; it was started {job.attempt} times.")
        if not attempt:
            return Chunk(items=[], has_more=False, ended=job.state.ended)
        self.attempt = attempt
        over = attempt < job.attempt or not job.state.active
        kept = log_path(folder, attempt)
        if kept.is_file():
            lines = lines_after(kept, self._line, self.after, PAGE)
            self._line = lines[-1] if lines else self._line
            texts = [line.text for line in lines]
            over = True
        else:
            texts = self._live(job, attempt)
        items = [
            wire.TandemLogLine(attempt=attempt, line=number, text=text)
            for number, text in enumerate(texts, self.after + 1)
        ]
        self.after += len(items)
        has_more = len(items) == PAGE
        return Chunk(items=items, has_more=has_more, ended=over and not has_more)

    def _live(self, job: Job, attempt: int) -> list[str]:
        handle = job.handle if attempt == job.attempt and job.handle else f"{job.id}.{attempt}"
        if self.source is None:
            raise UnknownLogError(
                f"No log of {handle} is kept, and this gateway belongs to no cluster that could have it."
            )
        if self._opened is None:
            self._opened = self.source()
        return list(itertools.islice(self._opened.log_lines(handle), self.after, self.after + PAGE))
