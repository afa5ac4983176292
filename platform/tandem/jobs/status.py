"""Status of a training job, folded from its events. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from tandem.observability.events import (
    CheckpointSaved,
    Event,
    Failed,
    FaultDetected,
    Finished,
    Notice,
    RegistrationFailed,
    Resized,
    Restarted,
    RolledBack,
    SlowRank,
    Started,
    Step,
    StepSkipped,
    Stopped,
)

WARNINGS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """Facts about a job after some of its events."""

    last_step: Step | None = None
    last_end: Started | Finished | Failed | Stopped | None = None
    """The newest start or end: a job that started again after an end has not ended."""
    started: bool = False
    workers: int | None = None
    layout: str | None = None
    checkpoint: int | None = None
    """Step of the newest checkpoint."""
    checkpoint_at: float | None = None
    """Seconds since 1970."""
    faults: Mapping[str, int] = field(default_factory=dict)
    """Number of faults by kind."""
    restarts: int = 0
    repeated_steps: int = 0
    skipped_steps: int = 0
    warnings: tuple[str, ...] = ()
    """The newest WARNINGS_SHOWN messages for the user."""

    def with_event(self, event: Event) -> JobStatus:
        """The status after one more event."""
        match event:
            case Step():
                return replace(self, last_step=event)
            case Started():
                # A driver that follows another one writes `started`, not `restart`.
                status = self._after_restart(event.resumed_from) if self.started else replace(self, started=True)
                return replace(status, last_end=event, workers=event.workers, layout=event.layout)
            case Restarted():
                return self._after_restart(event.resumed_from)
            case Resized():
                return replace(self, workers=event.to_workers, layout=event.layout)
            case CheckpointSaved():
                return replace(self, checkpoint=event.step, checkpoint_at=event.time)
            case FaultDetected():
                return replace(self, faults={**self.faults, event.kind: self.faults.get(event.kind, 0) + 1})
            case StepSkipped():
                return replace(self._warned(event.reason), skipped_steps=self.skipped_steps + 1)
            case SlowRank() | RolledBack():
                return self._warned(event.reason)
            case Notice():
                return self._warned(event.message)
            case RegistrationFailed():
                return self._warned(event.error)
            case Finished() | Failed() | Stopped():
                return replace(self, last_end=event)
            case _:
                return self

    def _after_restart(self, resumed_from: int | None) -> JobStatus:
        reached = self.last_step.step if self.last_step is not None else 0
        repeated_steps = max(0, reached - (resumed_from or 0))
        return replace(self, restarts=self.restarts + 1, repeated_steps=self.repeated_steps + repeated_steps)

    def _warned(self, message: str) -> JobStatus:
        return replace(self, warnings=(*self.warnings, message)[-WARNINGS_SHOWN:])


def fold_events(events: Iterable[Event]) -> JobStatus:
    """The status of a job by its events, oldest first."""
    status = JobStatus()
    for event in events:
        status = status.with_event(event)
    return status
