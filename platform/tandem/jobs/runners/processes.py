"""Runner of jobs as processes of this machine, which go on when the dispatcher ends.

Each attempt has a folder, and a parent process (`process_run`) that holds a lock there for as long as it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tandem.errors import JobError
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.runners import process_run
from tandem.jobs.work.records import Job
from tandem.private import make_private_folder
from tandem.storage import disk_errors, write_atomic

START_S = 30.0
"""Seconds that the parent process may take to start the command."""
LOG_CHARACTERS = 2000


class ProcessRunner:
    """See `tandem.jobs.dispatch.runner.Runner`. Handles are the names of the attempts' folders."""

    def __init__(self, root: Path, command: Callable[[Job], Sequence[str]], *, leave_s: float = 60.0) -> None:
        """`root`: a folder on a local disk. `command`: what runs a job; a result is the JSON object that it writes to the file
        `result.json` of the attempt's folder, whose path is the last argument.
        """
        self._root = root
        self._command = command
        self._leave_s = leave_s
        self._parents: dict[str, subprocess.Popen[bytes]] = {}
        """Processes that this one started: it has to wait for their ends, or they stay as zombies."""

    def start(self, job: Job) -> str:
        """See `Runner`."""
        folder = self._folder(job.run_name)
        with disk_errors("starting a job", folder):
            make_private_folder(folder)
            run = {"command": [*self._command(job), str(folder)], "leave_s": self._leave_s}
            write_atomic(folder / "run.json", json.dumps(run))
            parent = self._parents[job.run_name] = subprocess.Popen(
                [sys.executable, "-I", "-S", str(process_run.__file__), str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        # Another one may be the parent, which was started by a dispatcher that died.
        while self.find(job) is None:
            if time.monotonic() > deadline:
                parent.kill()
                raise JobError(f"{job.run_name} did not start within {START_S:g} s. Is the machine overloaded?")
            time.sleep(0.01)
        return job.run_name

    def find(self, job: Job) -> str | None:
        """See `Runner`."""
        folder = self._folder(job.run_name)
        return job.run_name if (folder / "started").exists() or (folder / "ended.json").exists() else None

    def state(self, handle: str) -> RunStatus | None:
        """See `Runner`."""
        self._reap()
        folder = self._folder(handle)
        if (end := _read_json(folder / "ended.json")) is None:
            if not (folder / "started").exists():
                return None
            with _lock(folder) as is_free:
                if not is_free:
                    return RunStatus(state=RunState.RUNNING)
            # It may have ended in between.
            if (end := _read_json(folder / "ended.json")) is None:
                return RunStatus(state=RunState.FAILED, error=f"The processes of {handle} were killed.")
        if end["exit_code"] == 0:
            return RunStatus(state=RunState.FINISHED, result=_read_json(folder / "result.json"))
        if end["stopped"]:
            return RunStatus(state=RunState.STOPPED)
        said = end.get("error") or _tail(folder / "log") or "It wrote nothing."
        return RunStatus(state=RunState.FAILED, error=f"Exit status {end['exit_code']}. {said}")

    def stop(self, job: Job) -> None:
        """See `Runner`."""
        self._reap()
        folder = self._folder(job.run_name)
        with disk_errors("stopping a job", folder):
            make_private_folder(folder)
            (folder / "stop").touch()
            with _lock(folder) as is_free:
                if is_free:
                    # A parent process that starts from now on finds `stop`, one that ran before has left its end.
                    if self.find(job) is None:
                        write_atomic(folder / "ended.json", json.dumps({"exit_code": None, "stopped": True}))
                    return
        with contextlib.suppress(OSError, ValueError):
            if not Path(f"/proc/{int((folder / 'started').read_text())}").exists():
                # The parent was killed; the command still holds the lock.
                os.killpg(int((folder / "child").read_text()), signal.SIGTERM)

    def _reap(self) -> None:
        self._parents = {name: parent for name, parent in self._parents.items() if parent.poll() is None}

    def _folder(self, name: str) -> Path:
        return self._root / name


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the lock of an attempt's folder; False where its processes hold it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(lock)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-LOG_CHARACTERS:].strip()
    except FileNotFoundError:
        return ""
