"""Webhook deliveries in the database: recorded from jobs that have ended, claimed by a lease, tried again with back-off.

A job's end is in its row, in the transaction that ended it. A delivery is made of it later, by any gateway and once, because its
id follows from what is delivered. So no process that dies loses an event.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, or_, select, update

from tandem.db.inserts import insert_into
from tandem.db.schema import JobRow, WebhookDeliveryRow
from tandem.jobs.webhooks.events import FAMILIES, WebhookEvent, event_id, event_type
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.retries import RetryPolicy
from tandem.jobs.work.states import ENDED, State

RETRIES = RetryPolicy(first_s=10.0, longest_s=3600.0, jitter=0.25)
TRIED_FOR = timedelta(days=1)
"""Time after a job's end for which its event is sent again; then it is given up."""
KEPT_FOR = timedelta(days=7)
"""Time after a job's end for which a delivery's row stays."""
LEASE = timedelta(seconds=60)
"""Time after which another gateway may send what one has claimed; an attempt takes less."""
PENDING, DELIVERED, GIVEN_UP = "pending", "delivered", "given_up"
LONGEST_ERROR = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Subscription:
    """What an endpoint is told of."""

    endpoint: str
    """SHA-256 of its URL."""
    events: Collection[str]
    tenant: str | None
    """None: all tenants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """An event that the claimer is to send now."""

    endpoint: str
    event: WebhookEvent
    attempts: int
    """Attempts, this one included."""


class Deliveries(WorkConnection):
    """The deliveries in a registry's database."""

    def record(self, subscriptions: Collection[Subscription], since: datetime | None = None) -> datetime:
        """Record the events of jobs that have ended since then (None: as long as events are tried); returns the time.

        Again nothing happens. A job's end is seen when its transaction has committed, which may be later than its time: leave a
        margin.
        """
        with self._transaction() as (session, now):
            oldest = max(now - TRIED_FOR, since or now - TRIED_FOR)
            query = select(JobRow.id, JobRow.tenant, JobRow.state, JobRow.ended_at).where(
                JobRow.ended_at >= oldest,
                JobRow.state.in_([state.value for state in ENDED]),
                or_(*(JobRow.id.startswith(prefix, autoescape=True) for prefix in FAMILIES)),
            )
            rows = [
                _row(each.endpoint, job, type_, now)
                for job in session.execute(query)
                if (type_ := event_type(job.id, State(job.state))) is not None
                for each in subscriptions
                if type_ in each.events and each.tenant in (None, job.tenant)
            ]
            if rows:
                session.execute(insert_into(session, WebhookDeliveryRow).on_conflict_do_nothing(), rows)
            return now

    def claim(self, endpoints: Collection[str], limit: int) -> list[Delivery]:
        """Events to be sent to these endpoints now, for `LEASE` this caller's alone."""
        row = WebhookDeliveryRow
        with self._transaction() as (session, now):
            query = select(row).where(row.state == PENDING, row.next_at <= now, row.endpoint.in_(endpoints))
            found = session.scalars(query.order_by(row.next_at).limit(limit).with_for_update(skip_locked=True)).all()
            for each in found:
                each.attempts += 1
                each.next_at = now + LEASE
            return [
                Delivery(
                    endpoint=each.endpoint,
                    event=WebhookEvent(id=each.id, type=each.event, job=each.job, occurred_at=each.occurred_at),
                    attempts=each.attempts,
                )
                for each in found
            ]

    def delivered(self, delivery: Delivery) -> None:
        """The endpoint has taken an event, in whichever attempt."""
        with self._transaction() as (session, _):
            session.execute(
                update(WebhookDeliveryRow)
                .where(WebhookDeliveryRow.id == delivery.event.id)
                .values(state=DELIVERED, error=None)
            )

    def failed(self, delivery: Delivery, error: str) -> bool:
        """An attempt failed; whether there is another one."""
        with self._transaction() as (session, now):
            next_at = now + timedelta(seconds=RETRIES.delay_s(delivery.attempts, random.random()))
            is_last = next_at > delivery.event.occurred_at + TRIED_FOR
            # Not where another gateway has claimed it since, or its endpoint has taken it.
            session.execute(
                update(WebhookDeliveryRow)
                .where(
                    WebhookDeliveryRow.id == delivery.event.id,
                    WebhookDeliveryRow.attempts == delivery.attempts,
                    WebhookDeliveryRow.state == PENDING,
                )
                .values(state=GIVEN_UP if is_last else PENDING, next_at=next_at, error=error[:LONGEST_ERROR])
            )
            return not is_last

    def forget_old(self) -> None:
        """Remove rows of events that are no longer tried."""
        with self._transaction() as (session, now):
            session.execute(delete(WebhookDeliveryRow).where(WebhookDeliveryRow.occurred_at < now - KEPT_FOR))

    def states(self) -> dict[str, str]:
        """The state of each delivery, by the event's id."""
        with self._reading() as session:
            return {row.id: row.state for row in session.scalars(select(WebhookDeliveryRow))}


def _row(endpoint: str, job: Any, type_: str, now: datetime) -> dict[str, Any]:
    """Columns of a new delivery."""
    return {
        "id": event_id(endpoint, job.id, type_, job.ended_at),
        "endpoint": endpoint,
        "tenant": job.tenant,
        "job": job.id,
        "event": type_,
        "occurred_at": job.ended_at,
        "state": PENDING,
        "attempts": 0,
        "next_at": now,
    }
