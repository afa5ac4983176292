"""Runs Tandem's commands as a person would: in a process of their own, in a home of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tandem.cluster.marks import MARK, marked_processes
from tandem.settings import child_environment

REPOSITORY = Path(__file__).parents[2]


def tandem(
    *arguments: str, home: Path, timeout_s: float = 300, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run `tandem ARGUMENTS` to its end."""
    return run([sys.executable, "-m", "tandem", *arguments], home=home, timeout_s=timeout_s, **environment)


def run(
    command: list[str], *, home: Path, timeout_s: float = 300, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a command from the repository's root to its end, with its output as one text."""
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env=child_environment({"TANDEM_HOME": str(home), "RAY_ADDRESS": None, "COLUMNS": "160", **environment}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Running:
    """A command that is running; its output grows in `text()`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, what: str | Callable[[], bool], timeout_s: float = 120) -> str:
        """Wait until the output has a text, or a condition holds; fails with the output if the command ends before."""
        deadline = time.monotonic() + timeout_s
        while not (what in self.text() if isinstance(what, str) else what()):
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what!r} within {timeout_s} s:\n{self.text()}"
            time.sleep(0.1)
        return self.text()

    def interrupt(self, number: int = signal.SIGINT, timeout_s: float = 60) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


@contextmanager
def started(command: list[str], *, home: Path, log: Path, **environment: str | None) -> Iterator[Running]:
    """A command that runs for the length of a block."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=child_environment({"TANDEM_HOME": str(home), "RAY_ADDRESS": None, "COLUMNS": "160", **environment}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        yield Running(process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def cluster_record(home: Path) -> Path:
    """The file that describes the local cluster of a home."""
    return home / f"cluster-{os.geteuid()}.json"


def cluster_mark(home: Path) -> str:
    """The mark that every process of a home's local cluster carries."""
    return str(json.loads(cluster_record(home).read_text())["environment"][MARK])


def gone(mark: str, timeout_s: float = 30) -> list[str]:
    """Command lines of what still carries a mark after at most `timeout_s`; empty when nothing is left."""
    deadline = time.monotonic() + timeout_s
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [" ".join(p.cmdline())[:120] for p in left]
