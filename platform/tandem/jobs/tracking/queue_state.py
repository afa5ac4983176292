"""State of the queue: jobs and requests by state, and the jobs that wait, from the database."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tandem.api import jobs as wire
from tandem.db.schema import JobRow, QueueItemRow
from tandem.jobs.tracking.view import waiting_to_wire
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.rows import to_job
from tandem.jobs.work.states import ENDED, JobKind, State

WAITING_SHOWN = 100
WAITING = [State.QUEUED.value]


class QueueState(WorkConnection):
    """Reader of the queue."""

    def read(self, tenant: str | None = None) -> wire.TandemQueue:
        """The queue as it is now; `tenant`: its jobs alone."""
        with self._reading() as session:
            now = self.clock.now(session.connection())
            own = () if tenant is None else (JobRow.tenant == tenant,)
            waits = (JobRow.state.in_(WAITING), *own)
            oldest: datetime | None = session.execute(select(func.min(JobRow.created_at)).where(*waits)).scalar_one()
            first = select(JobRow).where(*waits).order_by(JobRow.priority, JobRow.number).limit(WAITING_SHOWN)
            return wire.TandemQueue(
                jobs=_job_counts(session, tenant),
                requests=_request_counts(session, tenant),
                waiting=[waiting_to_wire(to_job(row)) for row in session.scalars(first)],
                oldest_waiting_s=None if oldest is None else max(0.0, (now - oldest).total_seconds()),
            )


def _job_counts(session: Session, tenant: str | None) -> list[wire.TandemJobCount]:
    query = select(JobRow.kind, JobRow.state, func.count())
    if tenant is not None:
        query = query.where(JobRow.tenant == tenant)
    rows = session.execute(query.group_by(JobRow.kind, JobRow.state).order_by(JobRow.kind, JobRow.state))
    return [
        wire.TandemJobCount(kind=JobKind(kind).value, state=State(state).value, count=count)
        for kind, state, count in rows
    ]


def _request_counts(session: Session, tenant: str | None) -> dict[wire.JobState, int]:
    query = select(QueueItemRow.state, func.count())
    # Those that have ended are kept, and may be millions.
    query = query.where(QueueItemRow.state.in_([state.value for state in State if state not in ENDED]))
    if tenant is not None:
        query = query.where(QueueItemRow.tenant == tenant)
    return {State(state).value: count for state, count in session.execute(query.group_by(QueueItemRow.state))}
