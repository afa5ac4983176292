"""Check of a content in a child process: a line of 10 MB does not stop the threads of the process that asks."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading

from tandem.errors import FileError
from tandem.files.checks.report import Finding, Report
from tandem.files.records import Purpose
from tandem.settings import child_environment
from tandem.storage import base_name

TIMEOUT, KILLED = "timeout", "killed"
UNCHECKED = (TIMEOUT, KILLED)
"""Codes of findings that say nothing about the content: the check did not end, and another one may."""


log = logging.getLogger(__name__)


class ContentCheck:
    """Runs one check at a time; `kill` ends it, and those that are begun later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def run(self, purpose: Purpose, location: str, timeout_s: float, *, endpoint: str | None = None) -> Report:
        """The report on a content. One that takes longer than `timeout_s`, or too much memory, is a finding.

        `endpoint`: the route that all requests of a batch must name.

        FileError if the content could not be read, or `kill` ended the check.
        """
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.files.checks", purpose.value, location, *([endpoint] if endpoint else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(),
        )
        with self._lock:
            self._process = process
            if self._killed:
                process.kill()
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return _unchecked(TIMEOUT, f"The content could not be checked within {timeout_s:g} s. Split the file.")
        finally:
            with self._lock:
                self._process = None
        if process.returncode < 0 and not self._killed:
            return _unchecked(
                KILLED, f"The check was ended by the signal {-process.returncode}, for its memory perhaps."
            )
        if process.returncode:
            last_line = errors.decode(errors="replace").strip().rpartition("\n")[2]
            log.warning("The check of %s ended with %d: %s", location, process.returncode, last_line[:300])
            # Without the location: the tenant reads this.
            raise FileError(
                f"The content of {base_name(location)} could not be checked: it is gone, or its store does not answer."
            )
        return Report.from_json(output)

    def kill(self) -> None:
        """End the check that runs, and each one that is begun later."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            self._killed = True
            if self._process is not None:
                self._process.kill()


def _unchecked(code: str, message: str) -> Report:
    return Report(num_lines=0, num_rows=0, findings=(Finding(code=code, message=message),), num_findings=1)
