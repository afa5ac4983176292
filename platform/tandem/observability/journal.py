"""Journal of a job or a sweep: its events, appended to a file and printed to the log."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from tandem.observability import codec
from tandem.observability.events import Event, Notice
from tandem.storage import disk_errors


@dataclass
class Journal:
    """Appends events to `path` (events.jsonl), and prints each for readers of the log. Safe to share between threads."""

    path: Path
    prints: bool = True
    """False where no log is written: on a terminal."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, event: Event) -> None:
        """Stamp, append and print one event; StorageError if the file cannot be written."""
        line = codec.encode(event)
        with self._lock, disk_errors("writing events", self.path):
            if self.prints:
                print(line, flush=True)
            with self.path.open("a") as file:
                file.write(line.removeprefix(codec.MARK) + "\n")

    def notice(self, message: str) -> None:
        """Write a `Notice`."""
        self.write(Notice(message=message))

    def read(self) -> list[Event]:
        """All events so far, those of earlier runs too."""
        # A device has no end to read to.
        return list(codec.read_events(self.path)) if self.path.is_file() else []
