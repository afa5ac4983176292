"""The queue of requests to models: order, leases, late answers, dead letters. On SQLite and PostgreSQL."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from tandem.errors import IdempotencyConflictError, IllegalTransitionError, UnknownJobError
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, Item, ItemSubmission, JobSubmission, Lease
from tandem.jobs.work.retries import RetryPolicy
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

ITEM = ItemSubmission(queue="base@1", payload={"prompt": "a"}, tenant="lab")
BATCH = JobSubmission(kind=JobKind.BATCH, name="answers", spec={}, tenant="lab")


def lease_of(item: Item) -> Lease:
    assert item.lease is not None
    return item.lease


def test_items_are_claimed_by_priority_and_then_in_the_order_of_submission(queue: ItemQueue) -> None:
    ids = [queue.submit(replace(ITEM, priority=priority)).id for priority in (5, 0, 5, -1)]
    queue.submit(replace(ITEM, queue="other@1"))
    claimed = queue.claim("base@1", "a", 30.0, limit=3)
    assert [item.id for item in claimed] == [ids[3], ids[1], ids[0]]
    assert [item.id for item in queue.claim("base@1", "b", 30.0, limit=3)] == [ids[2]]
    assert queue.claim("base@1", "c", 30.0) == []


def test_items_of_an_adapter_can_be_claimed_together(queue: ItemQueue) -> None:
    queue.add([replace(ITEM, adapter=f"adapter-{n % 2}@1") for n in range(6)])
    claimed = queue.claim("base@1", "a", 30.0, limit=10, adapter="adapter-1@1")
    assert [item.adapter for item in claimed] == ["adapter-1@1"] * 3


def test_waiting_items_are_listed_by_adapter_and_tenant_and_claimed_of_one_tenant(queue: ItemQueue) -> None:
    for adapter, tenant in (("b", "lab"), ("a", "lab"), ("a", "art"), ("b", "lab"), ("b", "zoo")):
        queue.submit(replace(ITEM, adapter=adapter, tenant=tenant))
    queue.submit(replace(ITEM, queue="other@1", adapter="c"))
    assert queue.waiting("base@1") == [("a", "art"), ("a", "lab"), ("b", "lab"), ("b", "zoo")]
    (claimed,) = queue.claim("base@1", "a", 30.0, limit=10, adapter="a", tenant="lab")
    assert (claimed.adapter, claimed.tenant) == ("a", "lab")
    assert ("a", "lab") not in queue.waiting("base@1") and queue.waiting("none@1") == []


def test_an_item_that_is_given_back_waits_and_counts_no_attempt(queue: ItemQueue, clock: ManualClock) -> None:
    item = queue.submit(replace(ITEM, max_attempts=1))
    for _ in range(3):
        (claimed,) = queue.claim("base@1", "a", 30.0)
        assert claimed.attempt == 1
        queue.report([Answer(lease=lease_of(claimed), error="the tenant is at its limit", retry_after_s=20.0)])
        given_back = queue.get(item.id)
        assert (given_back.state, given_back.failures, given_back.attempt) == (State.QUEUED, 0, 0)
        assert queue.claim("base@1", "a", 30.0) == []
        clock.advance(20.0)


def test_a_job_that_is_told_to_leave_or_has_ended_gets_no_items(queue: ItemQueue, store: JobStore) -> None:
    job = store.submit(BATCH).job.id
    assert queue.add([replace(ITEM, job=job, position=0)]) == 1
    assert store.claim(job, "dispatcher", 30.0) is not None
    for end in (store.pause, store.cancel):
        end(job)
        with pytest.raises(IllegalTransitionError, match="takes no more items"):
            queue.add([replace(ITEM, job=job, position=1)])
    assert queue.counts(job) == {State.CANCELLED: 1}


def test_a_job_is_answered_when_all_of_its_items_have_ended_by_themselves(queue: ItemQueue, store: JobStore) -> None:
    jobs = [store.submit(BATCH).job.id for _ in range(3)]
    queue.add([replace(ITEM, job=job, position=n) for n in range(2) for job in jobs])
    leases = [lease_of(item) for item in queue.claim("base@1", "a", 300.0, limit=5)]
    queue.report([Answer(lease=leases[0], error="bad", retryable=False), *(Answer(lease=each) for each in leases[1:])])
    assert queue.answered(jobs) == set(jobs[:2])
    store.cancel(jobs[2])
    assert queue.answered(jobs) == set(jobs[:2]), "cancelled items have no answer"


def test_workers_that_claim_at_once_get_different_items(url: str) -> None:
    with ItemQueue(url) as queue, ThreadPoolExecutor(4) as threads:
        queue.add([replace(ITEM, payload={"n": n}) for n in range(120)])
        calls = [threads.submit(queue.claim, "base@1", f"worker {n}", 30.0, limit=10) for n in range(16)]
        claimed = Counter(item.id for call in calls for item in call.result())
        assert len(claimed) == 120 and set(claimed.values()) == {1}


def test_rows_of_a_job_are_added_once_and_an_idempotency_key_makes_one_item(queue: ItemQueue, store: JobStore) -> None:
    job = store.submit(BATCH).job.id
    rows = [replace(ITEM, job=job, position=n) for n in range(1200)]
    assert queue.add(rows[:700]) == 700
    assert queue.add(rows) == 500
    assert queue.counts(job) == {State.QUEUED: 1200}
    assert [item.position for item in queue.items(job, after=997, limit=2)] == [998, 999]
    keyed = replace(ITEM, idempotency_key="once")
    assert queue.submit(keyed) == queue.submit(keyed)
    with pytest.raises(IdempotencyConflictError, match="sent before with other content"):
        queue.submit(replace(keyed, payload={"prompt": "b"}))


def test_an_answer_is_recorded_once_and_a_late_one_is_refused(queue: ItemQueue, clock: ManualClock) -> None:
    item = queue.submit(ITEM)
    late = lease_of(queue.claim("base@1", "a", 30.0)[0])
    assert queue.reclaim() == 0
    clock.advance(30.0)
    assert queue.reclaim(policy=RetryPolicy(first_s=1.0)) == 1
    assert queue.report([Answer(lease=late, result={"text": "late"})]).refused == [item.id]
    clock.advance(1.0)
    (again,) = queue.claim("base@1", "b", 30.0)
    assert again.id == item.id and again.attempt == 2 and lease_of(again).token > late.token
    assert queue.renew([late, lease_of(again)], 30.0) == [late]
    assert queue.report([Answer(lease=late, result={"text": "late"})]).refused == [item.id]
    assert queue.get(item.id).result is None
    answer = Answer(lease=lease_of(again), result={"text": "yes"})
    for _ in range(2):
        assert queue.report([answer]).recorded == [item.id]
    done = queue.get(item.id, tenant="lab")
    assert (done.state, done.result) == (State.FINISHED, {"text": "yes"})
    assert queue.report([Answer(lease=late, error="late")]).refused == [item.id]
    assert queue.get(item.id) == done
    with pytest.raises(UnknownJobError, match="no queue item"):
        queue.get(item.id, tenant="other")


def test_an_item_whose_attempts_all_fail_is_a_dead_letter(queue: ItemQueue, clock: ManualClock) -> None:
    item = queue.submit(replace(ITEM, max_attempts=2))
    for state in (State.QUEUED, State.DEAD):
        (claimed,) = queue.claim("base@1", "a", 30.0)
        queue.report([Answer(lease=lease_of(claimed), error="the engine died")])
        failed = queue.get(item.id)
        assert (failed.state, failed.error) == (state, "the engine died")
        clock.advance(60.0)
    assert queue.claim("base@1", "a", 30.0) == []
    bad = queue.submit(ITEM)
    (claimed,) = queue.claim("base@1", "a", 30.0)
    queue.report([Answer(lease=lease_of(claimed), error="no such field", retryable=False)])
    assert queue.get(bad.id).state is State.FAILED


def test_a_cancelled_or_overdue_item_is_taken_from_its_worker(queue: ItemQueue, clock: ManualClock) -> None:
    first, second = queue.submit(ITEM), queue.submit(replace(ITEM, deadline=clock.now() + timedelta(seconds=10)))
    leases = [lease_of(item) for item in queue.claim("base@1", "a", 300.0, limit=2)]
    assert queue.renew(leases, 300.0) == []
    assert queue.cancel(first.id).state is State.CANCELLED == queue.cancel(first.id).state
    clock.advance(10.0)
    assert queue.expire_overdue() == 1 and queue.expire_overdue() == 0
    assert queue.get(second.id).state is State.EXPIRED
    assert queue.renew(leases, 300.0) == leases
    assert queue.report([Answer(lease=lease, result={}) for lease in leases]).refused == [first.id, second.id]
    assert queue.get(first.id).state is State.CANCELLED and queue.get(second.id).result is None


def test_items_follow_their_batch_job(queue: ItemQueue, store: JobStore, clock: ManualClock) -> None:
    job = store.submit(BATCH).job.id
    soon = replace(ITEM, deadline=clock.now() + timedelta(seconds=10))
    queue.add([replace(soon, job=job, position=n) for n in range(4)])
    answered, running = queue.claim("base@1", "a", 300.0, limit=2)
    queue.report([Answer(lease=lease_of(answered), result={})])
    store.pause(job)
    assert queue.claim("base@1", "a", 300.0) == [], "items of a paused job wait"
    assert queue.counts(job) == {State.FINISHED: 1, State.RUNNING: 1, State.HELD: 2}
    store.cancel(job)
    assert queue.counts(job) == {State.FINISHED: 1, State.CANCELLED: 3}
    assert queue.renew([lease_of(running)], 300.0) == [lease_of(running)]
    clock.advance(10.0)
    store.requeue(job)
    assert queue.counts(job) == {State.FINISHED: 1, State.QUEUED: 3}
    assert queue.expire_overdue() == 0, "their deadlines have passed, and count no more"
