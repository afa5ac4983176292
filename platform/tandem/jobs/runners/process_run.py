"""Parent process of one attempt of a job on this machine: `python process_run.py FOLDER`. Standard library alone, to start fast.

FOLDER has `run.json` ({"command": [...], "leave_s": seconds}). Of several parents that are started for one folder one runs the
command, once: it holds `lock`, and the file `started` stands from then on. A file `stop` asks the command to leave by SIGTERM,
and ends it by SIGKILL after `leave_s`. `ended.json` ({"exit_code": ..., "stopped": ...}) is its end.
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
from pathlib import Path

POLL_S = 0.1


def main(folder: Path) -> None:
    """Run the command of a folder, unless that was done before."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if (folder / "started").exists() or (folder / "ended.json").exists():
        return
    if (folder / "stop").exists():
        write(folder / "ended.json", json.dumps({"exit_code": None, "stopped": True}))
        return
    run = json.loads((folder / "run.json").read_text())
    write(folder / "started", str(os.getpid()))
    with (folder / "log").open("ab") as log:
        try:
            # The child keeps the lock if this process is killed: the attempt then still counts as running.
            child = subprocess.Popen(
                run["command"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(lock,),
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            write(folder / "ended.json", json.dumps({"exit_code": 127, "stopped": False, "error": str(error)}))
            return
    write(folder / "child", str(child.pid))
    exit_code, stopped = watch(child, folder / "stop", run["leave_s"])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # what it left behind
    write(folder / "ended.json", json.dumps({"exit_code": exit_code, "stopped": stopped}))


def watch(child: subprocess.Popen[bytes], stop: Path, leave_s: float) -> tuple[int, bool]:
    """Wait for the end; returns the exit status, and whether it was told to leave."""
    asked_at: float | None = None
    while True:
        try:
            return child.wait(POLL_S), asked_at is not None
        except subprocess.TimeoutExpired:
            pass
        if asked_at is None and stop.exists():
            asked_at = time.monotonic()
            os.killpg(child.pid, signal.SIGTERM)
        elif asked_at is not None and time.monotonic() - asked_at > leave_s:
            os.killpg(child.pid, signal.SIGKILL)


def write(path: Path, content: str) -> None:
    """Publish a file whole."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(content)
    staging.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
