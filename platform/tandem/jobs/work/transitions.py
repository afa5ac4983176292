"""Transitions of job rows: the new state with all that follows from it, in the caller's transaction."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import case, select, update
from sqlalchemy.orm import Session

from tandem.db.schema import JobRow, QueueItemRow
from tandem.errors import LeaseLostError, UnknownJobError
from tandem.jobs.work.event_log import append_events
from tandem.jobs.work.records import Lease
from tandem.jobs.work.states import Action, JobKind, State, is_legal, next_state
from tandem.observability.events import StateChanged

REASON_CHARACTERS = 2000

_ITEMS_FOLLOW: dict[State, tuple[Action, ...]] = {
    State.HELD: (Action.HOLD,),
    State.PAUSING: (Action.HOLD,),
    State.PAUSED: (Action.HOLD,),
    State.PREEMPTING: (Action.HOLD,),
    State.QUEUED: (Action.RELEASE, Action.REQUEUE),
    State.STOPPING: (Action.CANCEL,),
    State.EXPIRING: (Action.EXPIRE,),
    State.CANCELLED: (Action.CANCEL,),
    State.EXPIRED: (Action.EXPIRE,),
    State.FAILED: (Action.CANCEL,),
    State.DEAD: (Action.CANCEL,),
}
"""Actions on a job's items when the job gets a state; only items to which they apply are changed."""
_COLLECTING = {State.CANCELLED: State.STOPPING, State.EXPIRED: State.EXPIRING}
"""States before the end of a waiting job some of whose items have been answered: its runner collects the answers."""
_REQUEUED_ITEMS = frozenset({State.CANCELLED, State.EXPIRED})
"""Ends of items that came from their job's end: they run again when the job does. Failed items do not."""


def locked_job(session: Session, job_id: str) -> JobRow:
    """The row of a job, which nobody else changes until the transaction ends; UnknownJobError without one."""
    row = session.execute(select(JobRow).where(JobRow.id == job_id).with_for_update()).scalar_one_or_none()
    if row is None:
        raise unknown_job(job_id)
    return row


def unknown_job(job_id: str) -> UnknownJobError:
    """The error for an id that no job has."""
    return UnknownJobError(f"There is no job {job_id[:120]!r}. List the jobs to see those that there are.")


def change_state(session: Session, row: JobRow, action: Action, now: datetime, *, reason: str | None = None) -> bool:
    """Apply an action to a locked row; False where it changes nothing, IllegalTransitionError where it is not legal."""
    before = State(row.state)
    after = next_state(JobKind(row.kind), before, action)
    if after in _COLLECTING and not before.active and _has_answers(session, row):
        after = _COLLECTING[after]
    if after is before:
        return False
    row.state = after.value
    row.reason = None if reason is None else reason[:REASON_CHARACTERS]
    if after.ended:
        row.ended_at = now
    elif before.ended:
        row.ended_at = row.error = row.result = row.not_before = None
        row.failures = 0
        if row.deadline is not None and row.deadline <= now:
            row.deadline = None
    if not after.active:
        row.lease_owner = row.lease_until = None
    changed = StateChanged(
        from_state=before.value, to_state=after.value, action=action.value, attempt=row.attempt, reason=row.reason
    )
    append_events(session, row, [changed], now)
    if row.kind == JobKind.BATCH.value:
        _change_items(session, row.id, after, now)
    return True


def _has_answers(session: Session, row: JobRow) -> bool:
    """Whether a batch that was started has items with an answer."""
    if row.kind != JobKind.BATCH.value or row.handle is None:
        return False
    answered = select(QueueItemRow.number).where(QueueItemRow.job == row.id, QueueItemRow.state == State.FINISHED.value)
    return session.execute(answered.limit(1)).first() is not None


def check_lease(row: JobRow | QueueItemRow, lease: Lease) -> bool:
    """Whether the lease is in force on a locked row; False where its holder has reported the end of the attempt before.

    LeaseLostError where somebody else has taken the work since, or it was given back without a report. A lease that has only
    run out is still in force: nobody else has taken the work.
    """
    if row.fencing_token == lease.token:
        if row.lease_owner == lease.owner:
            return True
        if row.lease_owner is None and not State(row.state).active:
            return False
    raise lease_lost(row, lease)


def lease_lost(row: JobRow | QueueItemRow, lease: Lease) -> LeaseLostError:
    """The error for a lease that is not in force on a row."""
    holder = f"{row.lease_owner} (token {row.fencing_token})" if row.lease_owner else "nobody"
    return LeaseLostError(
        f"{lease.owner} held {lease.id} with token {lease.token}; now {holder} does, and it is {row.state}. Nothing was changed. "
        "Stop working on it."
    )


def _change_items(session: Session, job_id: str, job_state: State, now: datetime) -> None:
    """Apply to a job's items what follows from the job's state; holders of items learn of it when they renew."""
    for action in _ITEMS_FOLLOW.get(job_state, ()):
        for after, before in _item_changes(action).items():
            # Locked in one order, as everybody does who locks several items: two transactions cannot wait for each other.
            locked = (
                select(QueueItemRow.number)
                .where(QueueItemRow.job == job_id, QueueItemRow.state.in_(before))
                .order_by(QueueItemRow.number)
                .with_for_update()
            )
            values: dict[str, Any] = {
                "state": after.value,
                "ended_at": now if after.ended else None,
                "fencing_token": QueueItemRow.fencing_token + case((QueueItemRow.lease_owner.is_not(None), 1), else_=0),
                "lease_owner": None,
                "lease_until": None,
            }
            if action is Action.REQUEUE:
                in_time = case((QueueItemRow.deadline > now, QueueItemRow.deadline), else_=None)
                values |= {"failures": 0, "not_before": None, "error": None, "deadline": in_time}
            session.execute(
                update(QueueItemRow).where(QueueItemRow.number.in_(locked)).values(values),
                execution_options={"synchronize_session": False},
            )


def _item_changes(action: Action) -> dict[State, list[str]]:
    """The states of items that an action changes, by the state that they get."""
    changes: dict[State, list[str]] = {}
    for before in _REQUEUED_ITEMS if action is Action.REQUEUE else State:
        if is_legal(JobKind.GENERATE, before, action):
            after = next_state(JobKind.GENERATE, before, action)
            if after is not before:
                changes.setdefault(after, []).append(before.value)
    return changes


def set_item_state(row: QueueItemRow, state: State, now: datetime) -> None:
    """Write the state of a locked item; its lease is given back by its holder."""
    row.ended_at = now if state.ended else None
    row.state = state.value
    if state is not State.RUNNING:
        row.lease_owner = row.lease_until = None


def end_lease_of_item(row: QueueItemRow, state: State, now: datetime) -> None:
    """Write the state of a locked item that others than its holder decided: what the holder still reports is refused."""
    if row.lease_owner is not None:
        row.fencing_token += 1
    set_item_state(row, state, now)
