"""Retention of jobs: those that ended long ago are deleted from the database, with their events and queue items.

A job's folder, its files and its models belong to its user, and stay. A job is kept for as long as there are jobs that go on from
it: it is their lineage.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session, aliased

from tandem.db.schema import JobEventRow, JobRow, QueueItemRow
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.leader import Term, check_term
from tandem.jobs.work.states import ENDED

LOOK_EVERY_S = 600.0
JOBS_OF_BATCH, ROWS_OF_BATCH = 100, 10_000
"""Jobs, and rows of events and items, that one transaction deletes, at most; a single job may have more rows."""
_ENDED = sorted(state.value for state in ENDED)

log = logging.getLogger(__name__)


class JobRetention(WorkConnection):
    """Deletion of what ended long ago."""

    def delete_ended(self, keep_s: float, *, term: Term | None = None) -> list[str]:
        """Delete a batch of jobs that ended more than `keep_s` seconds ago, the oldest first; returns their ids.

        With `term`, LeaseLostError unless it is the newest.
        """
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            ids = _batch(session, now - timedelta(seconds=keep_s))
            if ids:
                # Their events and items go with them.
                session.execute(delete(JobRow).where(JobRow.id.in_(ids)))
            return ids

    def delete_ended_items(self, keep_s: float, *, term: Term | None = None) -> int:
        """Delete a batch of queue items without a job, such as dead letters, that ended so long ago; returns their number."""
        with self._transaction() as (session, now):
            if term is not None:
                check_term(session, term)
            ended = (
                QueueItemRow.job.is_(None),
                QueueItemRow.state.in_(_ENDED),
                QueueItemRow.ended_at < now - timedelta(seconds=keep_s),
            )
            query = select(QueueItemRow.number).where(*ended).order_by(QueueItemRow.number).limit(ROWS_OF_BATCH)
            numbers = session.scalars(query.with_for_update(skip_locked=True)).all()
            if numbers:
                session.execute(delete(QueueItemRow).where(QueueItemRow.number.in_(numbers)))
            return len(numbers)


class Retention:
    """See `tandem.jobs.dispatch.chores.Chore`."""

    every_s = LOOK_EVERY_S

    def __init__(self, rows: JobRetention, keep_s: float) -> None:
        self._rows = rows
        self._keep_s = keep_s

    def run(self, term: Term | None) -> bool:
        """Delete a batch; whether there may be more."""
        jobs = self._rows.delete_ended(self._keep_s, term=term)
        items = self._rows.delete_ended_items(self._keep_s, term=term)
        if jobs or items:
            days = self._keep_s / 86400
            log.info("%d jobs and %d requests that ended %g days ago or more are deleted.", len(jobs), items, days)
        return bool(jobs) or items == ROWS_OF_BATCH


def _batch(session: Session, before: datetime) -> list[str]:
    """Ids of the first jobs to delete, whose rows are locked: nobody queues them again meanwhile."""
    child = aliased(JobRow)
    query = (
        select(JobRow.id)
        .where(
            JobRow.state.in_(_ENDED),
            JobRow.ended_at < before,
            ~select(child.number).where(child.parent == JobRow.id).exists(),
        )
        .order_by(JobRow.ended_at, JobRow.number)
        .limit(JOBS_OF_BATCH)
    )
    ids = session.scalars(query.with_for_update(skip_locked=True, of=JobRow)).all()
    rows = _rows_of(session, ids)
    sums = itertools.accumulate(rows.get(job_id, 0) for job_id in ids)
    return [
        job_id
        for place, (job_id, total) in enumerate(zip(ids, sums, strict=True))
        if not place or total <= ROWS_OF_BATCH
    ]


def _rows_of(session: Session, ids: Sequence[str]) -> dict[str, int]:
    """Number of events and items of each job."""
    found: dict[str, int] = {}
    for column in (JobEventRow.job, QueueItemRow.job):
        counted = select(column, func.count()).where(column.in_(ids)).group_by(column)
        for job_id, count in session.execute(counted):
            found[str(job_id)] = found.get(str(job_id), 0) + int(count)
    return found
