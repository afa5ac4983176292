"""Queue of requests to models: items of batch jobs, or alone, claimed by engines in order of priority and submission.

A worker claims several items at once, renews their leases, and reports the answers. Each claim has a fencing token that is
larger than those before it: an answer by an older one is refused and changes nothing. An item whose worker is gone is claimed
again, up to `max_attempts` times.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, aliased

from tandem.db.inserts import insert_into
from tandem.db.schema import JobRow, QueueItemRow
from tandem.errors import IdempotencyConflictError, IllegalTransitionError, LeaseLostError, UnknownJobError
from tandem.ids import fingerprint
from tandem.jobs.work.connection import WorkConnection
from tandem.jobs.work.records import Answer, Item, ItemSubmission, Lease, Reported, WaitingItems
from tandem.jobs.work.retries import ITEM_RETRIES, RetryPolicy, after_failure
from tandem.jobs.work.rows import item_values, to_item
from tandem.jobs.work.states import Action, JobKind, State, next_state
from tandem.jobs.work.transitions import check_lease, end_lease_of_item, set_item_state

ROWS_OF_STATEMENT = 500
JOB_STATES_THAT_TAKE_ITEMS = [state.value for state in (State.QUEUED, State.STARTING, State.RUNNING)]
UNANSWERED = [state.value for state in (State.QUEUED, State.HELD, State.RUNNING, State.CANCELLED, State.EXPIRED)]
"""States of items whose job has not been answered whole."""


class ItemQueue(WorkConnection):
    """Queue items in the database."""

    def add(self, items: Sequence[ItemSubmission]) -> int:
        """Store items, all or none; returns how many are new. Rows of a job that are there already are left as they are.

        IllegalTransitionError where their job is told to leave, or has ended: the items would outlive it.
        """
        with self._transaction() as (session, now):
            for job_id in sorted({item.job for item in items if item.job is not None}):
                _check_takes_items(session, job_id)
            return sum(
                len(_insert(session, items[start : start + ROWS_OF_STATEMENT], now))
                for start in range(0, len(items), ROWS_OF_STATEMENT)
            )

    def submit(self, item: ItemSubmission) -> Item:
        """Store one item; with an idempotency key that the tenant has sent before, the item of then.

        IdempotencyConflictError where the key was sent with another request.
        """
        with self._transaction() as (session, now):
            if numbers := _insert(session, [item], now):
                return to_item(session.get_one(QueueItemRow, numbers[0]))
            if item.idempotency_key is None:
                where: tuple[Any, ...] = (QueueItemRow.job == item.job, QueueItemRow.position == item.position)
            else:
                key = fingerprint(item.idempotency_key)
                where = (QueueItemRow.tenant == item.tenant, QueueItemRow.idempotency_key == key)
            row = session.execute(select(QueueItemRow).where(*where)).scalar_one()
            if (row.queue, row.payload) != (item.queue, None if item.payload is None else dict(item.payload)):
                raise IdempotencyConflictError(
                    f"The request was sent before with other content, as {row.id}. Send this one with a new idempotency key."
                )
            return to_item(row)

    def claim(
        self,
        queue: str,
        owner: str,
        lease_s: float,
        *,
        limit: int = 1,
        adapter: str | None = None,
        tenant: str | None = None,
    ) -> list[Item]:
        """Take the next items of a queue, `limit` at most, for `lease_s` seconds; with `adapter` or `tenant`, of that alone."""
        with self._transaction() as (session, now):
            query = select(QueueItemRow).where(
                QueueItemRow.queue == queue,
                QueueItemRow.state == State.QUEUED.value,
                or_(QueueItemRow.not_before.is_(None), QueueItemRow.not_before <= now),
                or_(QueueItemRow.deadline.is_(None), QueueItemRow.deadline > now),
            )
            if adapter is not None:
                query = query.where(QueueItemRow.adapter == adapter)
            if tenant is not None:
                query = query.where(QueueItemRow.tenant == tenant)
            query = query.order_by(QueueItemRow.priority, QueueItemRow.number).limit(limit)
            rows = session.scalars(query.with_for_update(skip_locked=True)).all()
            for row in rows:
                set_item_state(row, next_state(JobKind.GENERATE, State.QUEUED, Action.START), now)
                row.attempt += 1
                row.fencing_token += 1
                row.started_at = row.started_at or now
                row.lease_owner, row.lease_until = owner, now + timedelta(seconds=lease_s)
            return [to_item(row) for row in rows]

    def renew(self, leases: Sequence[Lease], lease_s: float) -> list[Lease]:
        """Hold items for `lease_s` seconds from now; returns the leases that are lost, whose requests have to be aborted."""
        lost = []
        with self._transaction() as (session, now):
            for lease, row in _locked(session, leases):
                if row is None or (row.lease_owner, row.fencing_token) != (lease.owner, lease.token):
                    lost.append(lease)
                else:
                    row.lease_until = now + timedelta(seconds=lease_s)
        return lost

    def report(self, answers: Sequence[Answer], *, policy: RetryPolicy = ITEM_RETRIES) -> Reported:
        """Record the ends of items. Those whose lease is lost are refused, each by itself."""
        by_lease = {answer.lease: answer for answer in answers}
        reported = Reported()
        with self._transaction() as (session, now):
            for lease, row in _locked(session, list(by_lease)):
                try:
                    if row is not None and check_lease(row, lease):
                        _end(row, by_lease[lease], policy, now)
                    (reported.refused if row is None else reported.recorded).append(lease.id)
                except LeaseLostError:
                    reported.refused.append(lease.id)
        return reported

    def cancel(self, item_id: str) -> Item:
        """End an item; its worker learns of it when it renews the lease. One that has ended stays as it is."""
        with self._transaction() as (session, now):
            query = select(QueueItemRow).where(QueueItemRow.id == item_id).with_for_update()
            row = session.execute(query).scalar_one_or_none()
            if row is None:
                raise _unknown(item_id)
            before = State(row.state)
            after = next_state(JobKind.GENERATE, before, Action.CANCEL)
            if after is not before:
                end_lease_of_item(row, after, now)
            return to_item(row)

    def reclaim(self, limit: int = 1000, *, policy: RetryPolicy = ITEM_RETRIES) -> int:
        """Queue items again whose lease has run out, or end them where it was the last attempt; returns their number."""
        with self._transaction() as (session, now):
            query = select(QueueItemRow).where(
                QueueItemRow.state == State.RUNNING.value, QueueItemRow.lease_until <= now
            )
            query = query.order_by(QueueItemRow.number).limit(limit).with_for_update(skip_locked=True)
            rows = session.scalars(query).all()
            for row in rows:
                lease = Lease(row.id, str(row.lease_owner), row.fencing_token)
                error = f"{row.lease_owner} did not renew its lease on attempt {row.attempt}."
                _end(row, Answer(lease=lease, error=error), policy, now)
                row.fencing_token += 1  # its worker may only be slow
            return len(rows)

    def expire_overdue(self, limit: int = 1000) -> int:
        """End items whose deadline has passed, `limit` at most; returns their number."""
        with self._transaction() as (session, now):
            states = [state.value for state in (State.QUEUED, State.HELD, State.RUNNING)]
            query = select(QueueItemRow).where(QueueItemRow.state.in_(states), QueueItemRow.deadline <= now)
            query = query.order_by(QueueItemRow.number).limit(limit).with_for_update(skip_locked=True)
            rows = session.scalars(query).all()
            for row in rows:
                end_lease_of_item(row, next_state(JobKind.GENERATE, State(row.state), Action.EXPIRE), now)
                row.error = f"Its deadline was {row.deadline:%Y-%m-%d %H:%M:%S} UTC."
            return len(rows)

    def get(self, item_id: str, *, tenant: str | None = None) -> Item:
        """An item; UnknownJobError where there is none, or it is not of the tenant."""
        with self._reading() as session:
            row = session.execute(select(QueueItemRow).where(QueueItemRow.id == item_id)).scalar_one_or_none()
            if row is None or tenant not in (None, row.tenant):
                raise _unknown(item_id)
            return to_item(row)

    def waiting(self, queue: str) -> list[WaitingItems]:
        """Adapters and tenants whose items wait in a queue. Seeks one row of each in the index, however many wait."""
        last = aliased(QueueItemRow)

        def first_number(*where: Any) -> Any:
            row = aliased(QueueItemRow)
            conditions = (row.queue == queue, row.state == State.QUEUED.value, *(each(row) for each in where))
            return select(row.number).where(*conditions).order_by(row.adapter, row.tenant).limit(1).scalar_subquery()

        next_tenant = first_number(lambda row: row.adapter == last.adapter, lambda row: row.tenant > last.tenant)
        next_adapter = first_number(lambda row: row.adapter > last.adapter)
        found = select(first_number().label("number")).cte("found", recursive=True)
        following = select(func.coalesce(next_tenant, next_adapter)).select_from(last)
        found = found.union_all(following.join(found, last.number == found.c.number))
        with self._reading() as session:
            query = select(QueueItemRow.adapter, QueueItemRow.tenant).join(found, QueueItemRow.number == found.c.number)
            return [WaitingItems(adapter, tenant) for adapter, tenant in session.execute(query)]

    def counts(self, job_id: str) -> dict[State, int]:
        """Number of a job's items in each state that any has."""
        with self._reading() as session:
            query = select(QueueItemRow.state, func.count()).where(QueueItemRow.job == job_id)
            return {State(state): count for state, count in session.execute(query.group_by(QueueItemRow.state))}

    def answered(self, job_ids: Iterable[str]) -> set[str]:
        """The jobs among these whose items have all ended by themselves: none waits, runs, was cancelled or has expired."""
        ids = sorted(job_ids)
        unanswered = select(QueueItemRow.number).where(
            QueueItemRow.job == JobRow.id, QueueItemRow.state.in_(UNANSWERED)
        )
        answered: set[str] = set()
        with self._reading() as session:
            for start in range(0, len(ids), ROWS_OF_STATEMENT):
                chunk = ids[start : start + ROWS_OF_STATEMENT]
                answered.update(session.scalars(select(JobRow.id).where(JobRow.id.in_(chunk), ~unanswered.exists())))
        return answered

    def items(self, job_id: str, *, after: int = -1, limit: int = 1000) -> list[Item]:
        """A job's items with positions above `after`, in the order of their rows."""
        with self._reading() as session:
            query = select(QueueItemRow).where(QueueItemRow.job == job_id, QueueItemRow.position > after)
            return [to_item(row) for row in session.scalars(query.order_by(QueueItemRow.position).limit(limit))]


def _check_takes_items(session: Session, job_id: str) -> None:
    """IllegalTransitionError unless a job may get items; it stays as it is until the transaction ends."""
    state = session.scalar(select(JobRow.state).where(JobRow.id == job_id).with_for_update())
    if state not in JOB_STATES_THAT_TAKE_ITEMS:
        raise IllegalTransitionError(f"The job {job_id} is {state}: it takes no more items.")


def _insert(session: Session, items: Sequence[ItemSubmission], now: datetime) -> Sequence[int]:
    statement = insert_into(session, QueueItemRow).values([item_values(item, now) for item in items])
    numbers: Sequence[int] = session.scalars(statement.on_conflict_do_nothing().returning(QueueItemRow.number)).all()
    return numbers


def _locked(session: Session, leases: Sequence[Lease]) -> Iterator[tuple[Lease, QueueItemRow | None]]:
    """Leases with the locked rows of their items; None for an item that is gone."""
    for start in range(0, len(leases), ROWS_OF_STATEMENT):
        chunk = leases[start : start + ROWS_OF_STATEMENT]
        query = select(QueueItemRow).where(QueueItemRow.id.in_({lease.id for lease in chunk}))
        # In one order, as everybody who locks several items: two transactions cannot wait for each other.
        rows = {row.id: row for row in session.scalars(query.order_by(QueueItemRow.number).with_for_update())}
        for lease in chunk:
            yield lease, rows.get(lease.id)


def _end(row: QueueItemRow, answer: Answer, policy: RetryPolicy, now: datetime) -> None:
    """Record the end of an attempt on a locked row whose lease is in force."""
    action = Action.FINISH
    row.error = answer.error
    if answer.retry_after_s is not None:
        action = Action.RETRY
        row.attempt -= 1
        row.not_before = now + timedelta(seconds=answer.retry_after_s)
    elif answer.error is not None:
        row.failures += 1
        action = after_failure(row.failures, row.max_attempts, retryable=answer.retryable)
        if action is Action.RETRY:
            row.not_before = now + timedelta(seconds=policy.delay_s(row.failures, random.random()))
    else:
        row.result = None if answer.result is None else dict(answer.result)
        row.result_reference = answer.result_reference
    set_item_state(row, next_state(JobKind.GENERATE, State(row.state), action), now)


def _unknown(item_id: str) -> UnknownJobError:
    return UnknownJobError(f"There is no queue item {item_id[:120]!r}. It may have been removed with its job.")
