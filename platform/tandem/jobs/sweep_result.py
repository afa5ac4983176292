"""End of a sweep: comparison of its trials, and registration of the best one. It needs no cluster."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import asdict, replace

from tandem.config.training.sweep import is_better
from tandem.errors import JobError, TandemError
from tandem.jobs.folder import JobFolder
from tandem.jobs.sweep import SweepFolder, score
from tandem.observability.events import (
    Event,
    Failed,
    Finished,
    RegistrationFailed,
    Started,
    SweepFinished,
    SweepStarted,
)
from tandem.observability.journal import Journal
from tandem.train.registration import Origin, register_result


def finish_sweep(sweep: SweepFolder, journal: Journal) -> SweepFinished:
    """Register the best trial, and write the event of the sweep's end. JobError if no trial has a value of the metric."""
    plan, jobs = sweep.plan(), sweep.jobs()
    scores = [score(plan.metric, job.typed_events()) if job.finished() else None for job in jobs]
    best = best_of(plan.metric, scores)
    if best is None:
        failed = [job for job in jobs if not job.finished()]
        raise JobError(
            f"None of the {len(jobs)} trials has a {plan.metric} to compare. "
            + (
                f"{len(failed)} failed, the last: {failure_reason(failed[-1])}"
                if failed
                else "Choose another --metric."
            )
        )
    model = register_best(jobs[best], journal) if plan.register else None
    finished = SweepFinished(best=best + 1, score=scores[best], job=jobs[best].id, model=model, scores=tuple(scores))
    journal.write(finished)
    return finished


def finish_if_over(sweep: SweepFolder) -> SweepFinished | None:
    """`finish_sweep` unless it is done or a trial may still run; returns the event of the end, None while there is none.

    For trials that run apart from each other: whichever ends last calls it with all others over. A failure is an event of the
    sweep, and is raised.
    """
    with _lock(sweep):
        if (end := sweep.finished()) or waiting_trials(sweep):
            return end
        journal = Journal(sweep.path / "events.jsonl")
        try:
            return finish_sweep(sweep, journal)
        except TandemError as error:
            journal.write(Failed(error=str(error)))
            raise


def waiting_trials(sweep: SweepFolder) -> list[int]:
    """Numbers (from 1) of the trials that have neither finished nor failed since the sweep was started last."""
    started = sweep.last(SweepStarted)
    since = (started.time or 0.0) if started is not None else 0.0
    return [
        number for number, job in enumerate(sweep.jobs(), 1) if not job.finished() and not has_failed(job, since=since)
    ]


def has_failed(job: JobFolder, *, since: float = 0.0) -> bool:
    """Whether a job's newest run has failed, and after `since` (seconds since 1970)."""
    end: Event | None = job.last(Failed, Started)
    return isinstance(end, Failed) and (end.time or 0.0) >= since


@contextlib.contextmanager
def _lock(sweep: SweepFolder) -> Iterator[None]:
    """Only one process at a time, of all nodes; no lock on a file system that has none."""
    with (sweep.path / "finish.lock").open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def best_of(metric: str, scores: list[float | None]) -> int | None:
    """Index of the best score, of equal ones the first; None without a score."""
    best_index: int | None = None
    for index, value in enumerate(scores):
        if value is not None and (best_index is None or is_better(metric, value, scores[best_index] or 0.0)):
            best_index = index
    return best_index


def failure_reason(job: JobFolder) -> str:
    """The error of a failed job, or the command that shows its log."""
    end: Event | None = job.last(Failed, Started)
    return end.error if isinstance(end, Failed) else f"`tandem train logs {job.id}` tells why."


def register_best(job: JobFolder, journal: Journal) -> str | None:
    """Register the result of a finished trial under the sweep's name, and record its id in the trial's journal.

    A failure is an event of the sweep, and is raised.
    """
    trial_journal = Journal(job.path / "events.jsonl")
    finished = next(event for event in reversed(trial_journal.read()) if isinstance(event, Finished))
    if finished.model is None:
        config = replace(job.config(), register=True)
        try:
            result = register_result(
                config, job.path, Origin.of(config), loss=finished.loss, evaluation=finished.evaluation
            )
        except TandemError as error:
            journal.write(RegistrationFailed(error=str(error)))
            raise
        finished = replace(finished, time=None, **asdict(result))
        trial_journal.write(finished)
    return finished.model
