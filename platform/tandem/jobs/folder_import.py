"""Import of jobs that commands submit: the leading dispatcher finds their folders, and follows them as its own jobs.

`tandem train submit` asks the cluster by itself, and leaves a folder with `submissions.json` in TANDEM_HOME. Each look lists the
folders and compares the age of that file with the one seen before; files are read only where it has changed. A folder without a
submission is not a job yet.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Protocol

from tandem.errors import ConfigError, RegistryError, RegistryUnreachableError
from tandem.jobs.fine_tuning.folder import SPEC as FINE_TUNING_SPEC
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.folder_jobs import RUNNER, Folder, folder_submission, past_run
from tandem.jobs.runners.ray import keep_attempt_log
from tandem.jobs.sweep import SweepFolder
from tandem.jobs.work.leader import Term
from tandem.jobs.work.records import Job, PastRun
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.settings import settings

LOOK_EVERY_S = 10.0
FOLDERS_OF_LOOK = 50
"""Folders whose files are read in one look, at most: the dispatcher has its lead to renew."""
SILENT_S = 600.0
"""Seconds without a line in its journal after which a run that is on no cluster that is known here counts as stopped."""

log = logging.getLogger(__name__)

_Signature = tuple[tuple[int, int, int] | None, ...]


class Submissions(Protocol):
    """The submissions of a cluster, as `tandem.jobs.client.JobClient` knows them."""

    def states(self) -> Mapping[str, JobState]:
        """States by submission id. ClusterError where the cluster does not answer."""

    def log_lines(self, submission: str) -> Iterable[str]:
        """The log so far, line by line."""


class _Watch(Enum):
    """Which files of a folder have to change before it is read again."""

    SUBMISSIONS = ("submissions.json",)
    FILES = ("submissions.json", "config.yaml", "sweep.json", "events.jsonl")
    NOTHING = ()
    """It is read at the next look."""


class FolderImport:
    """See `tandem.jobs.dispatch.chores.Chore`. One for each dispatcher."""

    every_s = LOOK_EVERY_S

    def __init__(self, store: JobStore, cluster: Callable[[], Submissions], *, keep_s: float | None = None) -> None:
        """`cluster`: the one of the dispatcher's runners, as it is now.

        `keep_s`: seconds without a change after which a folder that the store does not know is left out: its job may have been
        deleted (`jobs.work.retention`). None: no folder is.
        """
        self._store = store
        self._cluster = cluster
        self._keep_s = math.inf if keep_s is None else keep_s
        self._seen: dict[Path, tuple[_Watch, _Signature]] = {}

    def run(self, term: Term | None) -> bool:
        """One look; whether more folders are left. LeaseLostError unless the term is the newest."""
        changed = list(self._changed())
        read, left = changed[:FOLDERS_OF_LOOK], changed[FOLDERS_OF_LOOK:]
        known = self._store.known([folder.id for folder in read]) if read else {}
        look = _Look(self._store, self._cluster, term, self._keep_s)
        for folder in read:
            before = {watch: _signature(folder.path, watch) for watch in _Watch}
            try:
                watch = look.take(folder, known.get(folder.id))
            except RegistryUnreachableError:
                raise
            except (ConfigError, RegistryError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("%s was not imported: %s", folder.path, error)
                watch = _Watch.FILES
            self._seen[folder.path] = watch, before[watch]
        return bool(left)

    def _changed(self) -> Iterator[Folder]:
        """Folders of submitted jobs that have to be read."""
        for root, kind in ((settings().jobs_dir, JobFolder), (settings().sweeps_dir, SweepFolder)):
            for path in _folders(root):
                watch, signature = self._seen.get(path, (_Watch.NOTHING, ()))
                now = _signature(path, _Watch.SUBMISSIONS)
                is_same = watch is not _Watch.NOTHING and signature == _signature(path, watch)
                if now != (None,) and not is_same:
                    yield kind(path)


class _Look:
    """One look: the cluster is asked once, and only where a folder needs it."""

    def __init__(self, store: JobStore, cluster: Callable[[], Submissions], term: Term | None, keep_s: float) -> None:
        self._store = store
        self._open = cluster
        self._term = term
        self._keep_s = keep_s
        self._opened: tuple[Submissions, Mapping[str, JobState]] | None = None

    def take(self, folder: Folder, job: Job | None) -> _Watch:
        """Bring the store in line with a folder; what to watch until it is read again."""
        submissions = folder.submissions()
        if not submissions or (folder.path / FINE_TUNING_SPEC).exists() or (job is not None and job.runner != RUNNER):
            return _Watch.SUBMISSIONS
        submission = str(submissions[-1]["id"])
        if job is not None:
            if job.state.active:
                # Followed already; a newer submission is followed when this attempt has ended.
                is_followed = submission in (job.handle, job.run_name)
                return _Watch.SUBMISSIONS if is_followed else _Watch.NOTHING
            if folder.last_attempt() <= job.attempt and job.state is not State.PAUSED:
                return _Watch.SUBMISSIONS
        live = self._cluster[1].get(submission)
        run = past_run(folder, live)
        has_no_end = live is None and run.state is State.PAUSED
        if has_no_end and _written_s_ago(folder) < SILENT_S:
            return _Watch.NOTHING
        if job is None and run.state is not State.RUNNING and _written_s_ago(folder) > self._keep_s:
            return _Watch.SUBMISSIONS
        self._write(folder, job, run)
        if live is not None and live.over:
            keep_attempt_log(self._cluster[0], folder, submission)
        # A run on another cluster may write its end later.
        return _Watch.FILES if has_no_end else _Watch.SUBMISSIONS

    def _write(self, folder: Folder, job: Job | None, run: PastRun) -> None:
        if job is None:
            self._store.record(folder_submission(folder), run, term=self._term)
        else:
            self._store.follow(folder_submission(folder), run, term=self._term)

    @property
    def _cluster(self) -> tuple[Submissions, Mapping[str, JobState]]:
        if self._opened is None:
            opened = self._open()
            self._opened = opened, opened.states()
        return self._opened


def _folders(root: Path) -> Iterator[Path]:
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())
    except FileNotFoundError:
        return
    yield from (root / name for name in names)


def _signature(folder: Path, watch: _Watch) -> _Signature:
    """Inodes, times and sizes of the files; files are replaced whole, or appended to."""
    return tuple(_age(folder / name) for name in watch.value)


def _age(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _written_s_ago(folder: Folder) -> float:
    """Seconds since the newest line of the journal, or else since the submission."""
    files = [_age(folder.path / name) for name in ("events.jsonl", "submissions.json")]
    return time.time() - max(age[1] for age in files if age is not None) / 1e9
