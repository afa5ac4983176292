"""Events and progress of fine-tuning runs, read from their journals; what was read once is not read again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.jobs.tracking.history import decoded
from tandem.jobs.tracking.line_file import START, Line, lines_after
from tandem.observability.events import Event, FineTuningPlanned, Step

REMEMBERED = 10_000
"""Journals of which it is remembered how far they were read, a few hundred bytes each."""
PAGE = 1000
"""Lines that are read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunProgress:
    """How far a run is."""

    planned: FineTuningPlanned | None = None
    """Newest plan; None until the files are read."""
    first_step: Step | None = None
    """Earliest step with a time."""
    last_step: Step | None = None

    def after(self, event: Event) -> RunProgress:
        """The progress once an event has happened."""
        if isinstance(event, FineTuningPlanned):
            return replace(self, planned=event)
        if isinstance(event, Step) and event.time is not None:
            return replace(self, first_step=self.first_step or event, last_step=event)
        return self


def next_events(journal: Path, last: Line) -> tuple[list[Event], Line]:
    """Events that follow the line `last`, of `PAGE` lines at most, and the newest of these lines. StorageError."""
    lines = lines_after(journal, last, last.number, PAGE)
    return [event for _, event in decoded(lines)], lines[-1]._replace(text="") if lines else last


class ProgressReader:
    """The progress of any number of runs. Safe to share between threads."""

    def __init__(self) -> None:
        self._read: OrderedDict[Path, tuple[Line, RunProgress]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, journal: Path) -> RunProgress:
        """Progress of the run that appends to `journal`; nothing where there is no such file. StorageError."""
        with self._lock:
            line, progress = self._read.get(journal, (START, RunProgress()))
        if line.end and _size(journal) < line.end:
            # Another file has taken its place, by a restore.
            line, progress = START, RunProgress()
        while True:
            events, reached = next_events(journal, line)
            if reached == line:
                break
            line = reached
            for event in events:
                progress = progress.after(event)
        with self._lock:
            self._read[journal] = (line, progress)
            self._read.move_to_end(journal)
            if len(self._read) > REMEMBERED:
                self._read.popitem(last=False)
        return progress


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
