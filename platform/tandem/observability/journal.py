"""Where the driver of a job or a sweep writes its events."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.observability import events
from tandem.storage import disk_errors


@dataclass
class Journal:
    """The job's events: appended to events.jsonl, and printed for whoever follows the log."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, event: dict[str, Any]) -> None:
        """Stamp, write and print one event."""
        line = events.encode(event)
        with self._lock, disk_errors("writing events", self.path):
            print(line, flush=True)
            with self.path.open("a") as file:
                file.write(line.removeprefix(events.MARK) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All events of the job, of earlier runs too."""
        # A device has no end to read to.
        return list(events.read(self.path)) if self.path.is_file() else []
