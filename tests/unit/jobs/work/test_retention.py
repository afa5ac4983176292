"""Jobs that ended long ago are deleted with all that is theirs in the database; others stay. On SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tandem.errors import LeaseLostError, UnknownJobError
from tandem.jobs.work import retention
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.leader import Leadership
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, ItemSubmission, JobSubmission
from tandem.jobs.work.retention import JobRetention, Retention
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

DAY_S = 86400.0


@pytest.fixture
def rows(url: str, clock: ManualClock) -> Iterator[JobRetention]:
    with JobRetention(url, clock=clock) as opened:
        yield opened


def submit(store: JobStore, name: str, *, ended: bool = True, parent: str | None = None, items: int = 0) -> str:
    """A job of a batch, cancelled unless it is to wait."""
    job = JobSubmission(kind=JobKind.BATCH, name=name, id=name, spec={}, parent=parent)
    store.submit(job)
    if items:
        with ItemQueue(store.url, clock=store.clock) as queue:
            queue.add([ItemSubmission(queue="b", payload={}, job=name, position=n) for n in range(items)])
    if ended:
        store.cancel(name)
    return name


def ids(store: JobStore) -> set[str]:
    return {job.id for job in store.page(limit=1000).jobs}


def test_what_ended_long_ago_is_deleted_with_events_and_items_and_nothing_else(
    store: JobStore, queue: ItemQueue, rows: JobRetention, clock: ManualClock
) -> None:
    old = submit(store, "old", items=3)
    submit(store, "waiting", ended=False, items=1)
    dead, alone = (queue.submit(ItemSubmission(queue="x", payload={}, max_attempts=1)).id for _ in range(2))
    (claimed,) = queue.claim("x", "worker", 30.0)
    assert claimed.id == dead and claimed.lease is not None
    queue.report([Answer(lease=claimed.lease, error="no answer")])
    assert queue.get(dead).state is State.DEAD
    clock.advance(20 * DAY_S)
    submit(store, "recent", items=1)
    clock.advance(11 * DAY_S)
    chore = Retention(rows, 30 * DAY_S)
    while chore.run(None):
        pass
    assert ids(store) == {"waiting", "recent"}
    assert store.events(old) == [] and queue.items(old) == []
    assert len(queue.items("waiting")) == len(queue.items("recent")) == 1
    assert store.events("waiting") and queue.get(alone).state is State.QUEUED
    with pytest.raises(UnknownJobError):
        queue.get(dead)
    clock.advance(20 * DAY_S)
    chore.run(None)
    assert ids(store) == {"waiting"}


def test_a_job_stays_until_all_that_go_on_from_it_are_deleted(
    store: JobStore, rows: JobRetention, clock: ManualClock
) -> None:
    first, second = submit(store, "first"), submit(store, "second", parent="first")
    submit(store, "third", ended=False, parent=second)
    clock.advance(100 * DAY_S)
    assert rows.delete_ended(30 * DAY_S) == []
    store.cancel("third")
    clock.advance(31 * DAY_S)
    assert [rows.delete_ended(30 * DAY_S) for _ in range(3)] == [["third"], [second], [first]]


def test_a_job_that_is_queued_again_in_time_is_kept(store: JobStore, rows: JobRetention, clock: ManualClock) -> None:
    job = submit(store, "a")
    clock.advance(31 * DAY_S)
    store.requeue(job)
    assert rows.delete_ended(30 * DAY_S) == [] and ids(store) == {job}


def test_a_batch_deletes_a_bounded_number_of_rows_and_always_one_job(
    store: JobStore, rows: JobRetention, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ROWS_OF_BATCH", 10)
    for name, items in (("large", 30), ("small-1", 1), ("small-2", 1), ("small-3", 6)):
        submit(store, name, items=items)
        clock.advance(1.0)
    clock.advance(31 * DAY_S)
    deleted = [rows.delete_ended(30 * DAY_S) for _ in range(4)]
    # Each has two events, of its submission and its end.
    assert deleted == [["large"], ["small-1", "small-2"], ["small-3"], []]


def test_a_leader_whose_term_has_ended_deletes_nothing(
    store: JobStore, rows: JobRetention, leadership: Leadership, clock: ManualClock
) -> None:
    submit(store, "old")
    clock.advance(31 * DAY_S)
    term = leadership.acquire("dispatcher", "a", 30.0)
    clock.advance(31.0)
    assert term is not None and leadership.acquire("dispatcher", "b", 30.0) is not None
    with pytest.raises(LeaseLostError):
        Retention(rows, 30 * DAY_S).run(term)
    assert ids(store) == {"old"}
