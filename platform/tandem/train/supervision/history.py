"""What the attempts of a job know of each other, and what comes of one (`train.supervision.attempts`)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.observability.journal import Journal
from tandem.train.reporting.metrics import Metrics


class StopRequest:
    """Whether the job was told to stop; set by a signal's handler, which may do nothing more."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.training = False
        """Whether there are workers that could save what they have."""
        self.overdue = False
        """Whether they have had their time."""

    def set(self) -> None:
        """The job was told to stop."""
        self._event.set()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def interrupt(self) -> None:
        """End the main thread's wait for workers that do not leave, with the signal that requested the stop."""
        self.overdue = True
        os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Why an attempt broke off."""

    kind: str
    """worker, node, controller, hang or workers (more than one)."""
    reason: str
    rank: int | None = None


@dataclass
class RunHistory:
    """What the attempts of this driver have in common."""

    journal: Journal
    metrics: Metrics
    exported: Callable[[dict[str, Any]], None] = lambda end: None
    """Called in a thread when what was trained lies whole in the job's folder: workers take seconds more to end."""
    starts: int = 0
    workers: int = 0
    """Of the attempt before."""
    reason: str = ""
    """Why it ended."""
    step: int = 0
    """The last step that was told of."""
    broke_at: float = 0.0
    """When that attempt got its last step done."""


@dataclass
class Outcome:
    """What came of an attempt."""

    end: dict[str, Any] = field(default_factory=dict)
    """The workers' last event, if they are done."""
    left: dict[str, Any] | None = None
    """Their last event, if they left on request."""
    refusal: tuple[str, str, int] | None = None
    """An error that another attempt would meet again: class, text, exit status."""
    fault: Fault | None = None


def last_line(text: str) -> str:
    """What an error of Ray's says in the end, without its advice."""
    # What Ray has to say of any process that ended tells nothing of this one.
    said = text.partition("Some common causes include")[0]
    lines = [line.strip() for line in said.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"
