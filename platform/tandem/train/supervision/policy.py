"""Restart policy: from the outcome of an attempt and the history of the run to the next step of the driver. Pure.

| outcome                         | decision                                                                    |
|---------------------------------|-----------------------------------------------------------------------------|
| an error that would recur       | Stop with that error                                                        |
| any, after a stop request       | Stop with JobStopped                                                        |
| loss spike                      | SkipRows: back to the newest checkpoint; Stop after faults.spike.max_rollbacks |
| stopped for a resize or a node  | Resize to the capacity of the cluster                                       |
| no room for the workers         | Resize, and wait for room                                                   |
| fault                           | Restart; Stop after checkpoint.max_failures in a row without a new checkpoint |
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem import errors
from tandem.errors import JobError, JobStopped, TandemError
from tandem.observability.events import LossSpikeReport
from tandem.train.supervision.history import RunHistory
from tandem.train.supervision.outcome import Fault, Faulted, NoCapacity, Refused, StoppedEarly


@dataclass(frozen=True, slots=True)
class Restart:
    """Run the workers again from the newest checkpoint, after a fault."""

    fault: Fault
    failures: int
    """Failures in a row without a new checkpoint, this one included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resize:
    """Run again with as many workers as the cluster has room for."""

    reason: str
    waiting: bool = False
    """There was no room for the last attempt."""
    announce: bool = False
    """Tell the user that the run waits: once until it trains again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipRows:
    """Run again from the newest checkpoint, without the rows that came before the loss jumped."""

    rows: tuple[int, int]
    """The first row, and the one after the last."""
    spike: LossSpikeReport
    at_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run with an error."""

    error: TandemError
    fault: Fault | None = None
    """The fault that ended the last attempt."""


Decision = Restart | Resize | SkipRows | Stop


def decide(outcome: Refused | StoppedEarly | NoCapacity | Faulted, history: RunHistory) -> Decision:
    """The decision after an attempt that did not complete. `history` holds the facts after that attempt."""
    if isinstance(outcome, Refused):
        return Stop(getattr(errors, outcome.error, JobError)(outcome.message))
    if history.stop_requested:
        return Stop(
            JobStopped(
                f"The job was told to stop, and stopped after step {history.last_step}. "
                f"The same command resumes it from step {history.checkpoint_step or 0}."
            )
        )
    match outcome:
        case NoCapacity(workers):
            reason = f"there was no room for {workers} workers"
            return Resize(reason=reason, waiting=True, announce=not history.waiting_for_capacity)
        case StoppedEarly(spike=LossSpikeReport() as spike):
            return _after_spike(outcome, spike, history)
        case StoppedEarly():
            return Resize(reason=outcome.reason)
        case Faulted(fault):
            return _after_fault(fault, history)


def updated_history(decision: Decision, history: RunHistory) -> RunHistory:
    """The history after a decision was taken."""
    match decision:
        case Restart():
            return replace(history, failures=decision.failures, failed_at_step=history.checkpoint_step or 0)
        case Resize():
            return replace(history, waiting_for_capacity=decision.waiting)
        case SkipRows():
            skipped = (*history.skipped_rows, decision.rows)
            return replace(history, waiting_for_capacity=False, skipped_rows=skipped)
        case Stop():
            return history


def _after_spike(outcome: StoppedEarly, spike: LossSpikeReport, history: RunHistory) -> SkipRows | Stop:
    fact = f"the loss jumped to {spike.loss:.4g} in step {outcome.step}, from {spike.median:.4g}"
    rollbacks, limits = len(history.skipped_rows), history.spike
    if rollbacks >= limits.max_rollbacks:
        return Stop(
            JobError(
                f"{fact[0].upper()}{fact[1:]}, and the run has gone back {rollbacks} times before. Lower "
                f"optimizer.learning_rate, or raise faults.spike.max_rollbacks ({limits.max_rollbacks}) or "
                f"faults.spike.factor ({limits.factor:g})."
            )
        )
    first = history.checkpoint_rows
    return SkipRows(
        rows=(first, spike.rows),
        spike=spike,
        at_step=outcome.step,
        reason=f"{fact}: rows {first} to {spike.rows - 1} are skipped",
    )


def _after_fault(fault: Fault, history: RunHistory) -> Restart | Stop:
    step = history.checkpoint_step or 0
    # Progress resets the count: a run that saves new checkpoints may fail often, one that does not is given up.
    failures = 1 if step > history.failed_at_step else history.failures + 1
    if failures <= history.max_failures:
        return Restart(fault, failures)
    start = "the start" if history.checkpoint_step is None else f"step {step}"
    return Stop(
        JobError(
            f"Training failed {failures} times without a new checkpoint in between, the last time with: {fault.reason} "
            f"Run the same command again to resume from {start}."
        ),
        fault,
    )
