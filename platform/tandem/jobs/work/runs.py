"""Runs of jobs: claimed with a lease, reported by its holder, taken over from a holder that is gone.

Each lease has a fencing token that is larger than those before it. A write by an older token is refused with LeaseLostError and
changes nothing. A report that is sent again, because its answer was lost, changes nothing either.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import exists, func, or_, select

from tandem.db.schema import JobRow
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.leader import Term, check_term
from tandem.jobs.work.records import Job, Lease
from tandem.jobs.work.retries import JOB_RETRIES, RetryPolicy, after_failure
from tandem.jobs.work.rows import to_job
from tandem.jobs.work.states import ACTIVE, Action, State
from tandem.jobs.work.transitions import change_state, check_lease, locked_job


class Renewed(NamedTuple):
    """Result of renewing several leases."""

    held: list[Job]
    """As they are now: one in a state that is `leaving` has to be stopped."""
    lost: list[Lease]


class JobRuns(WorkConnection):
    """What dispatchers and workers write."""

    def waiting(self, limit: int = 1000) -> list[Job]:
        """Jobs in the queue that may start now: most urgent first, then in the order of submission.

        Of each tenant the first `limit`: a long queue of one does not hide the jobs of others.
        """
        with self._reading() as session:
            now, order = self.clock.now(session.connection()), (JobRow.priority, JobRow.number)
            place = func.row_number().over(partition_by=JobRow.tenant, order_by=order).label("place")
            placed = select(JobRow.number, place).where(JobRow.state == State.QUEUED.value, *_due(now)).subquery()
            query = select(JobRow).join(placed, JobRow.number == placed.c.number).where(placed.c.place <= limit)
            return [to_job(row) for row in session.scalars(query.order_by(*order))]

    def active(self) -> list[Job]:
        """Jobs that a process may be running."""
        with self._reading() as session:
            query = select(JobRow).where(JobRow.state.in_([state.value for state in ACTIVE]))
            return [to_job(row) for row in session.scalars(query.order_by(JobRow.number))]

    def has_queued(self) -> bool:
        """Whether any job waits to be started."""
        with self._reading() as session:
            return bool(session.scalar(select(exists().where(JobRow.state == State.QUEUED.value))))

    def claim(
        self, job_id: str, owner: str, lease_s: float, *, workers: int | None = None, term: Term | None = None
    ) -> Job | None:
        """Take a job that waits, as a new attempt, for `lease_s` seconds; None where it does not wait, or somebody else takes it.

        With `term`, LeaseLostError unless it is the newest.
        """
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            waits = (JobRow.id == job_id, JobRow.state == State.QUEUED.value, *_due(now))
            row = session.execute(select(JobRow).where(*waits).with_for_update(skip_locked=True)).scalar_one_or_none()
            if row is None:
                return None
            row.attempt += 1
            row.handle = None
            row.workers = workers if workers is not None else row.min_workers
            _lease_out(row, owner, lease_s, now)
            change_state(session, row, Action.START, now)
            return to_job(row)

    def take_over(self, job_id: str, owner: str, lease_s: float, *, term: Term | None = None) -> Job | None:
        """Continue the attempt of a holder whose lease has run out, or, as the leader of `term`, of any earlier dispatcher.

        None where nobody works on it any more, or its lease is in force.
        """
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            row = locked_job(session, job_id)
            if not State(row.state).active or (term is None and row.lease_until is not None and row.lease_until > now):
                return None
            _lease_out(row, owner, lease_s, now)
            return to_job(row)

    def renew(self, leases: Sequence[Lease], lease_s: float) -> Renewed:
        """Hold these leases for `lease_s` seconds from now."""
        renewed = Renewed([], [])
        with self._transaction() as (session, now):
            query = select(JobRow).where(JobRow.id.in_({lease.id for lease in leases}))
            rows = {row.id: row for row in session.scalars(query.order_by(JobRow.number).with_for_update())}
            for lease in leases:
                row = rows.get(lease.id)
                if row is None or (row.lease_owner, row.fencing_token) != (lease.owner, lease.token):
                    renewed.lost.append(lease)
                else:
                    row.lease_until = now + timedelta(seconds=lease_s)
                    renewed.held.append(to_job(row))
        return renewed

    def started(self, lease: Lease, handle: str) -> Job:
        """The runner has started the attempt under this handle. A request to leave that came meanwhile stays."""
        with self._transaction() as (session, now):
            row = locked_job(session, lease.id)
            if check_lease(row, lease):
                row.handle = handle
                row.started_at = row.started_at or now
                change_state(session, row, Action.STARTED, now)
            return to_job(row)

    def finish(self, lease: Lease, result: Mapping[str, Any] | None = None) -> Job:
        """The work is done, with this JSON-able result."""
        with self._transaction() as (session, now):
            row = locked_job(session, lease.id)
            if check_lease(row, lease):
                row.result = None if result is None else dict(result)
                row.error = None
                change_state(session, row, Action.FINISH, now)
            return to_job(row)

    def fail(
        self,
        lease: Lease,
        error: str,
        *,
        retryable: bool = True,
        result: Mapping[str, Any] | None = None,
        policy: RetryPolicy = JOB_RETRIES,
        draw: float | None = None,
    ) -> Job:
        """The attempt failed: wait for the next one, or end as `failed` (not retryable) or `dead` (it was the last).

        `draw`, uniform in [0, 1), decides the jitter of the delay; None: it is drawn.
        """
        with self._transaction() as (session, now):
            row = locked_job(session, lease.id)
            if check_lease(row, lease):
                row.failures += 1
                row.error = error
                row.result = None if result is None else dict(result)
                action = after_failure(row.failures, row.max_attempts, retryable=retryable)
                if action is Action.RETRY:
                    delay_s = policy.delay_s(row.failures, random.random() if draw is None else draw)
                    row.not_before = now + timedelta(seconds=delay_s)
                change_state(session, row, action, now, reason=error)
            return to_job(row)

    def stopped(self, lease: Lease, result: Mapping[str, Any] | None = None) -> Job:
        """Nothing of it runs any more, as was asked; `result`: of what was done by then."""
        with self._transaction() as (session, now):
            row = locked_job(session, lease.id)
            if check_lease(row, lease):
                row.result = None if result is None else dict(result)
                change_state(session, row, Action.STOPPED, now)
            return to_job(row)


def _due(now: datetime) -> tuple[Any, ...]:
    return (
        or_(JobRow.not_before.is_(None), JobRow.not_before <= now),
        or_(JobRow.deadline.is_(None), JobRow.deadline > now),
    )


def _lease_out(row: JobRow, owner: str, lease_s: float, now: datetime) -> None:
    row.lease_owner, row.lease_until = owner, now + timedelta(seconds=lease_s)
    row.fencing_token += 1
