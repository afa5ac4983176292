"""Submission of jobs: each is stored once, whichever gateway gets it, and however often it is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tandem.db.inserts import insert_into
from tandem.db.schema import JobRow
from tandem.errors import IdempotencyConflictError, JobError
from tandem.ids import fingerprint
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.event_log import append_events
from tandem.jobs.work.leader import Term, check_term
from tandem.jobs.work.records import JobSubmission, PastRun, Submitted
from tandem.jobs.work.rows import job_values, request_digest, to_job
from tandem.jobs.work.states import Action, State
from tandem.jobs.work.transitions import change_state, locked_job
from tandem.observability.events import StateChanged

_OF_SUBMISSION = (
    "name",
    "spec",
    "request_digest",
    "cpus_per_worker",
    "gpus_per_worker",
    "min_workers",
    "max_workers",
)
_NOT_ENDED = [state.value for state in State if not state.ended]
_ACTIONS_TO = {
    State.RUNNING: (),
    State.FINISHED: (Action.FINISH,),
    State.FAILED: (Action.FAIL,),
    State.PAUSED: (Action.PAUSE, Action.STOPPED),
}
"""From running to the state of a past run."""


class JobSubmissions(WorkConnection):
    """Entry of jobs into the database."""

    def submit(self, submission: JobSubmission, *, also: Callable[[Session], None] | None = None) -> Submitted:
        """Store a job, unless the tenant has submitted it before.

        The same idempotency key means the same job, as it is. The same content hash does too, and a job of that content which has
        ended without success, or is paused, goes back into the queue. IdempotencyConflictError where the key was sent with
        another request, JobError where the id is taken.

        `also`: what else is done in the transaction where the job is new. An error of it leaves nothing of both.
        """
        with self._transaction() as (session, now):
            row = _insert(session, job_values(submission, now))
            if row is None:
                return Submitted(to_job(_earlier(session, submission, now)), False)
            if also is not None:
                also(session)
            append_events(session, row, [StateChanged(to_state=row.state, action="submit")], now)
            return Submitted(to_job(row), True)

    def record(self, submission: JobSubmission, past: PastRun, *, term: Term | None = None) -> bool:
        """Store a job that a command has started; False where it is known, and left as it is.

        One that runs has no lease yet: a dispatcher takes it over. With `term`, LeaseLostError unless it is the newest.
        """
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            history = {
                "state": past.state.value,
                "attempt": past.attempt,
                "handle": past.handle,
                "created_at": past.created_at,
                "started_at": past.started_at,
                "ended_at": past.ended_at,
                "error": past.error,
                "result": None if past.result is None else dict(past.result),
                "workers": submission.resources.max_workers if past.state.active else None,
            }
            row = _insert(session, job_values(submission, now) | history)
            if row is None:
                return False
            recorded = StateChanged(to_state=row.state, action="import", attempt=row.attempt)
            append_events(session, row, [recorded], now)
            return True

    def follow(self, submission: JobSubmission, past: PastRun, *, term: Term | None = None) -> bool:
        """Bring a known job in line with an attempt that a command has started; False where it is active, or knows of it.

        It gets the config and resources of the submission. With `term`, LeaseLostError unless it is the newest.
        """
        assert submission.id is not None
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            row = locked_job(session, submission.id)
            is_newer = past.attempt > row.attempt
            has_ended = (
                past.attempt == row.attempt and row.state == State.PAUSED.value and past.state is not State.PAUSED
            )
            if State(row.state).active or not (is_newer or has_ended):
                return False
            if row.state in (State.QUEUED.value, State.HELD.value) and past.state not in (
                State.RUNNING,
                State.FINISHED,
            ):
                # It goes on waiting; its next attempt must not have the name of that one.
                row.attempt = past.attempt
                return False
            values = job_values(submission, now)
            for name in _OF_SUBMISSION:
                setattr(row, name, values[name])
            row.attempt, row.handle, row.workers = past.attempt, past.handle, row.max_workers
            row.not_before, row.failures = None, 0
            row.started_at = row.started_at or past.started_at
            change_state(session, row, Action.ADOPT, now, reason="its command has started it")
            for action in _ACTIONS_TO[past.state]:
                change_state(session, row, action, now, reason=past.error)
            row.error, row.result = past.error, None if past.result is None else dict(past.result)
            row.ended_at = past.ended_at
            return True


def is_over_active(session: Session, tenant: str, runner: str, most: int) -> bool:
    """Whether a tenant has more than `most` jobs of a runner that have not ended."""
    of_tenant = (JobRow.tenant == tenant, JobRow.runner == runner, JobRow.state.in_(_NOT_ENDED))
    return len(session.scalars(select(JobRow.number).where(*of_tenant).limit(most + 1)).all()) > most


def _insert(session: Session, values: Mapping[str, Any]) -> JobRow | None:
    """The row of a new job; None where its id, content or idempotency key is there already."""
    # One statement: of two that insert the same job at once, the second waits, and then inserts nothing.
    statement = insert_into(session, JobRow).values(**values).on_conflict_do_nothing()
    number = session.execute(statement.returning(JobRow.number)).scalar_one_or_none()
    return None if number is None else session.get_one(JobRow, number)


def _earlier(session: Session, submission: JobSubmission, now: datetime) -> JobRow:
    """The locked row of the earlier submission, back in the queue where it has to run again."""
    for matched_by, condition in _matches(submission):
        row = session.execute(select(JobRow).where(*condition).with_for_update()).scalar_one_or_none()
        if row is None:
            continue
        if matched_by == "key":
            if row.request_digest != request_digest(submission):
                raise IdempotencyConflictError(
                    f"The idempotency key was sent before, with another request, which made the job {row.id}. Send this one with "
                    "a new key."
                )
            return row
        if matched_by == "id" and None in (row.content_hash, submission.content_hash):
            break
        _run_again(session, row, submission, now)
        return row
    raise JobError(f"The id {submission.id!r} belongs to another job. Submit this one with another name.")


def _matches(submission: JobSubmission) -> Iterator[tuple[str, tuple[Any, ...]]]:
    of_tenant = JobRow.tenant == submission.tenant
    if submission.idempotency_key is not None:
        yield "key", (of_tenant, JobRow.idempotency_key == fingerprint(submission.idempotency_key))
    kind = JobRow.kind == submission.kind.value
    if submission.content_hash is not None:
        yield "content", (of_tenant, kind, JobRow.content_hash == submission.content_hash)
    if submission.id is not None:
        yield "id", (of_tenant, kind, JobRow.id == submission.id)


def _run_again(session: Session, row: JobRow, submission: JobSubmission, now: datetime) -> None:
    state = State(row.state)
    if state is State.PAUSED:
        action = Action.RESUME
    elif state.ended and state is not State.FINISHED:
        action = Action.REQUEUE
    else:
        return
    change_state(session, row, action, now, reason="submitted again")
    row.failures = 0
    row.not_before, row.deadline = submission.not_before, submission.deadline
