"""Outcomes of one attempt to run the workers: completed, refused, stopped, without capacity, or ended by a fault."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.observability.events import Exported, LossSpikeReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Cause of an attempt that ended unexpectedly."""

    kind: str
    """worker, workers (more than one), node, hang, mailbox or controller."""
    reason: str
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """The workers trained to the last step and exported the result."""

    exported: Exported


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A worker met an error that another attempt would meet again."""

    error: str
    """Name of a class in `tandem.errors`."""
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppedEarly:
    """The workers saved and stopped before the last step."""

    step: int
    reason: str
    spike: LossSpikeReport | None = None
    """Set if they stopped because the loss jumped; they have not saved then."""


@dataclass(frozen=True, slots=True)
class NoCapacity:
    """Ray could not place the workers within its timeout."""

    workers: int


@dataclass(frozen=True, slots=True)
class Faulted:
    """A fault ended the attempt."""

    fault: Fault


Outcome = Completed | Refused | StoppedEarly | NoCapacity | Faulted


def last_line(message: str) -> str:
    """The last line of a Ray error, without Ray's advice, at most 500 characters."""
    # Ray's list of common causes for a dead process says nothing about this one.
    message = message.partition("Some common causes include")[0]
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return lines[-1][:500] if lines else "no reason given"
