"""Event log of a job: appended to and read by number, which grows by one with each event of the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from tandem.db.schema import JobEventRow, JobRow
from tandem.jobs.work.records import NumberedEvent
from tandem.observability import codec
from tandem.observability.events import Event


def append_events(session: Session, job: JobRow, events: Sequence[Event], now: datetime) -> None:
    """Add events to a job whose row is locked by the session. Those without a time get that of `now`."""
    rows = []
    for number, event in enumerate(events, job.last_event + 1):
        stamped = event if event.time is not None else replace(event, time=round(now.timestamp(), 3))
        rows.append({"job": job.id, "number": number, "at": now, "event": codec.to_json(stamped)})
    if rows:
        # The job's row first: a new one has to be there before its events.
        job.last_event += len(rows)
        session.flush()
        session.execute(insert(JobEventRow), rows)


def read_events(session: Session, job_id: str, *, after: int, limit: int) -> list[NumberedEvent]:
    """Events with numbers above `after`, oldest first; of kinds that this release knows."""
    query = select(JobEventRow.number, JobEventRow.event).where(JobEventRow.job == job_id, JobEventRow.number > after)
    rows = session.execute(query.order_by(JobEventRow.number).limit(limit))
    decoded = ((number, codec.from_json(values)) for number, values in rows)
    return [NumberedEvent(number, event) for number, event in decoded if event is not None]
