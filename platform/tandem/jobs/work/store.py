"""Store of jobs: submission, runs, requests of clients and operators, lists and events.

All gateways, dispatchers and command lines of a cluster use the same database. Times are the database's (`clock`). Nothing is
kept in memory: a process that dies between two calls loses nothing that was answered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from tandem.db.schema import JobRow
from tandem.errors import IllegalTransitionError
from tandem.jobs.work.event_log import append_events, read_events
from tandem.jobs.work.leader import Term, check_term
from tandem.jobs.work.records import Job, JobPage, Lease, NumberedEvent
from tandem.jobs.work.rows import to_job
from tandem.jobs.work.runs import JobRuns
from tandem.jobs.work.states import Action, JobKind, State
from tandem.jobs.work.submissions import JobSubmissions
from tandem.jobs.work.transitions import change_state, check_lease, lease_lost, locked_job, unknown_job
from tandem.observability.events import Event, ResizeRequested

EXPIRABLE = [state.value for state in State if not state.ended and state not in (State.STOPPING, State.EXPIRING)]
EXPLAINED_AT_ONCE = 500
"""Jobs whose reasons are written in one transaction: a statement has few parameters, and nobody waits long for the rows."""


class JobStore(JobSubmissions, JobRuns):
    """Jobs in the database."""

    # ---- requests of clients and operators ----

    def change(
        self,
        job_id: str,
        action: Action,
        *,
        reason: str | None = None,
        also: Callable[[Session, Job], None] | None = None,
    ) -> Job:
        """Apply an action to a job; IllegalTransitionError where its kind and state do not allow that. See the methods below.

        `also`: what else is done in the transaction where the state changes. An error of it undoes both.
        """
        with self._transaction() as (session, now):
            row = locked_job(session, job_id)
            if change_state(session, row, action, now, reason=reason) and also is not None:
                also(session, to_job(row))
            return to_job(row)

    def if_ended(self, job_id: str, work: Callable[[Session], None]) -> bool:
        """Do `work` in a transaction if a job has ended, which nobody queues again meanwhile; whether it has ended."""
        with self._transaction() as (session, _):
            if not State(locked_job(session, job_id).state).ended:
                return False
            work(session)
            return True

    def cancel(self, job_id: str, *, reason: str | None = None) -> Job:
        """End a job: at once where it waits, else as soon as nothing of it runs. One that has ended stays as it is."""
        return self.change(job_id, Action.CANCEL, reason=reason)

    def pause(self, job_id: str, *, reason: str | None = None) -> Job:
        """Let a job save and leave, until it is resumed; IllegalTransitionError for kinds without checkpoints."""
        return self.change(job_id, Action.PAUSE, reason=reason)

    def resume(self, job_id: str, *, reason: str | None = None) -> Job:
        """Put a paused job into the queue again."""
        return self.change(job_id, Action.RESUME, reason=reason)

    def hold(self, job_id: str, *, reason: str | None = None) -> Job:
        """Keep a job that waits from starting."""
        return self.change(job_id, Action.HOLD, reason=reason)

    def release(self, job_id: str, *, reason: str | None = None) -> Job:
        """Let a held job start."""
        return self.change(job_id, Action.RELEASE, reason=reason)

    def preempt(
        self,
        job_id: str,
        *,
        reason: str | None = None,
        workers: int | None = None,
        term: Term | None = None,
        attempt: int | None = None,
    ) -> Job:
        """Let a job save and leave, and wait in the queue again.

        With `workers`, its next attempt is to have so many; the event that says so tells a resize from a preemption. `term` and
        `attempt` fence a dispatcher's decision: LeaseLostError unless the term is the newest, IllegalTransitionError where the
        job is in another attempt.
        """
        with self._transaction() as (session, now):
            row = _decided_job(session, job_id, term, attempt)
            if change_state(session, row, Action.PREEMPT, now, reason=reason) and workers is not None:
                append_events(
                    session, row, [ResizeRequested(workers=workers, attempt=row.attempt, reason=row.reason)], now
                )
            return to_job(row)

    def expire(
        self, job_id: str, *, reason: str | None = None, term: Term | None = None, attempt: int | None = None
    ) -> Job:
        """End a job that has used up its time: at once where it waits, else with a checkpoint, as soon as it has left.

        `term` and `attempt` as for `preempt`.
        """
        with self._transaction() as (session, now):
            row = _decided_job(session, job_id, term, attempt)
            change_state(session, row, Action.EXPIRE, now, reason=reason)
            return to_job(row)

    def requeue(self, job_id: str, *, reason: str | None = None) -> Job:
        """Run a job again that ended without success, such as a dead letter; its failures are counted anew."""
        return self.change(job_id, Action.REQUEUE, reason=reason)

    def expire_overdue(self, limit: int = 100) -> list[Job]:
        """Expire jobs whose deadline has passed, `limit` at most; those that run have to be stopped then."""
        with self._transaction() as (session, now):
            query = select(JobRow).where(JobRow.state.in_(EXPIRABLE), JobRow.deadline <= now)
            rows = session.scalars(query.order_by(JobRow.number).limit(limit).with_for_update(skip_locked=True)).all()
            for row in rows:
                change_state(
                    session, row, Action.EXPIRE, now, reason=f"its deadline was {row.deadline:%Y-%m-%d %H:%M:%S} UTC"
                )
            return [to_job(row) for row in rows]

    def explain(self, reasons: Mapping[str, str], state: State = State.QUEUED) -> None:
        """Record why jobs are still in a state, by id; jobs in other states are left alone."""
        ids = iter(reasons)
        while some := list(itertools.islice(ids, EXPLAINED_AT_ONCE)):
            with self._transaction() as (session, _):
                query = select(JobRow).where(JobRow.id.in_(some), JobRow.state == state.value)
                for row in session.scalars(query.order_by(JobRow.number).with_for_update()):
                    row.reason = reasons[row.id]

    # ---- reading ----

    def get(self, job_id: str, *, tenant: str | None = None) -> Job:
        """A job; UnknownJobError where there is none, or it is not of the tenant."""
        with self._reading() as session:
            row = session.execute(select(JobRow).where(JobRow.id == job_id)).scalar_one_or_none()
            if row is None or tenant not in (None, row.tenant):
                raise unknown_job(job_id)
            return to_job(row)

    def known(self, ids: Collection[str]) -> dict[str, Job]:
        """Those of some jobs that there are, by id."""
        with self._reading() as session:
            return {row.id: to_job(row) for row in session.scalars(select(JobRow).where(JobRow.id.in_(ids)))}

    def page(
        self,
        *,
        tenant: str | None = None,
        kinds: Collection[JobKind] | None = None,
        states: Collection[State] | None = None,
        parent: str | None = None,
        after: str | None = None,
        limit: int = 20,
    ) -> JobPage:
        """Jobs of a tenant (None: of all), newest first; `after`: id of the last job of the page before."""
        query = select(JobRow)
        if tenant is not None:
            query = query.where(JobRow.tenant == tenant)
        if kinds is not None:
            query = query.where(JobRow.kind.in_([kind.value for kind in kinds]))
        if states is not None:
            query = query.where(JobRow.state.in_([state.value for state in states]))
        if parent is not None:
            query = query.where(JobRow.parent == parent)
        if after is not None:
            query = query.where(JobRow.number < self.get(after, tenant=tenant).number)
        with self._reading() as session:
            rows = session.scalars(query.order_by(JobRow.number.desc()).limit(limit + 1)).all()
        return JobPage([to_job(row) for row in rows[:limit]], len(rows) > limit)

    # ---- events ----

    def append(self, lease: Lease, events: Sequence[Event]) -> int:
        """Add events of a run; returns the number of the last. LeaseLostError where the lease is not in force any more."""
        with self._transaction() as (session, now):
            row = locked_job(session, lease.id)
            if not check_lease(row, lease):
                raise lease_lost(row, lease)
            append_events(session, row, events, now)
            return row.last_event

    def events(self, job_id: str, *, after: int = 0, limit: int = 100) -> list[NumberedEvent]:
        """A job's events with numbers above `after`, oldest first."""
        with self._reading() as session:
            return read_events(session, job_id, after=after, limit=limit)


def _decided_job(session: Session, job_id: str, term: Term | None, attempt: int | None) -> JobRow:
    """The locked row of a job about which the leader of a term has decided, seeing it in an attempt; None: not checked."""
    if term is not None:
        check_term(session, term)
    row = locked_job(session, job_id)
    if attempt not in (None, row.attempt):
        raise IllegalTransitionError(f"The decision was about attempt {attempt}; the job is in attempt {row.attempt}.")
    return row
