"""Events, checkpoints and the results file of a fine-tuning job, from the events of its training. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tandem.observability.events import (
    CheckpointExported,
    CheckpointRegistered,
    Evaluated,
    Event,
    Failed,
    FaultDetected,
    FineTuningPlanned,
    Finished,
    Notice,
    RegistrationFailed,
    Resized,
    Restarted,
    RolledBack,
    Started,
    Step,
    StepSkipped,
    Stopped,
)

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """An event as the API tells it."""

    number: int
    """Position among the job's events, from 0: with the job's id, the event's."""
    at: float
    """Seconds since 1970."""
    level: Level
    message: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Not empty: the event is one of metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredCheckpoint:
    """A checkpoint that was registered as a model."""

    step: int
    model: str
    """Id in the registry."""
    at: float
    train_loss: float | None = None
    valid_loss: float | None = None


def reports(events: Sequence[Event], *, first: int = 0) -> list[Report]:
    """What a client is told, oldest first; `first`: the number of the first of these events."""
    told = []
    for number, event in enumerate(events, first):
        report = _told(event)
        if report is not None:
            level, message, metrics = report
            told.append(Report(number=number, at=event.time or 0.0, level=level, message=message, metrics=metrics))
    return told


def _told(event: Event) -> tuple[Level, str, dict[str, Any]] | None:
    match event:
        case FineTuningPlanned():
            return "info", f"Files validated: {event.examples} examples, {event.steps} steps.", {}
        case Started():
            return "info", "Fine-tuning job started.", {}
        case Step(loss=None):
            return None
        case Step():
            message = f"Step {event.step}/{event.steps}: training loss={event.loss:.4f}"
            return "info", message, {"step": event.step, "total_steps": event.steps, "train_loss": event.loss}
        case Evaluated():
            loss = event.measured.get("loss")
            if loss is None:
                return None
            message = f"Step {event.step}: full validation loss={loss:.4f}"
            return "info", message, {"step": event.step, "full_valid_loss": loss, "valid_loss": loss}
        case CheckpointRegistered():
            return "info", f"Checkpoint created at step {event.step}: {event.model}", {}
        case Resized() | Restarted() | StepSkipped() | RolledBack():
            return "warn", event.reason, {}
        case FaultDetected():
            return "warn", f"Interrupted: {event.reason}", {}
        case Notice():
            return "warn", event.message, {}
        case RegistrationFailed() | Failed():
            return "error", event.error, {}
        case Stopped():
            return "info", f"Stopped: {event.reason}", {}
        case Finished():
            return "info", f"New fine-tuned model created: {event.model}", {}
    return None


def checkpoints(events: Iterable[Event]) -> list[RegisteredCheckpoint]:
    """Checkpoints that were registered, oldest step first; of a step that was computed again the last."""
    losses: dict[int, tuple[float | None, float | None]] = {}
    found: dict[int, RegisteredCheckpoint] = {}
    for event in events:
        if isinstance(event, CheckpointExported):
            valid_loss = (event.evaluation or {}).get("evaluation_loss")
            losses[event.step] = (event.loss, valid_loss)
        elif isinstance(event, CheckpointRegistered):
            train_loss, valid_loss = losses.get(event.step, (None, None))
            found[event.step] = RegisteredCheckpoint(
                step=event.step, model=event.model, at=event.time or 0.0, train_loss=train_loss, valid_loss=valid_loss
            )
    return [found[step] for step in sorted(found)]


def results_csv(events: Iterable[Event]) -> str:
    """The results file: a line for each reported step."""
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, Step):
            rows.setdefault(event.step, {})["train_loss"] = event.loss
        elif isinstance(event, Evaluated) and "loss" in event.measured:
            rows.setdefault(event.step, {})["full_valid_loss"] = event.measured["loss"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "train_loss", "full_valid_loss"], restval="")
    writer.writeheader()
    writer.writerows({"step": step, **rows[step]} for step in sorted(rows))
    return text.getvalue()
