"""A job's run time and preemptions over all attempts, read from its events in real databases."""

from __future__ import annotations

from scheduled_world import submission

from tandem.jobs.dispatch.history import RunHistory, read_history
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.store import JobStore


def attempt(store: JobStore, clock: ManualClock, seconds: float, workers: int | None = None) -> None:
    """Run the job `a` for some seconds until it has left after a preemption."""
    claimed = store.claim("a", "dispatcher", 30.0)
    assert claimed is not None and claimed.lease is not None
    clock.advance(seconds)
    store.preempt("a", workers=workers)
    store.stopped(claimed.lease)


def test_run_time_adds_up_over_attempts_and_a_resize_is_no_preemption(store: JobStore, clock: ManualClock) -> None:
    store.submit(submission("a"))
    assert read_history(store, "a") == RunHistory()
    clock.advance(100.0)
    attempt(store, clock, 10.0)
    attempt(store, clock, 20.0, workers=3)
    assert read_history(store, "a") == RunHistory(ran_s=30.0, preemptions=1, resize_to=3)
    store.claim("a", "dispatcher", 30.0)
    started_s = clock.now().timestamp()
    clock.advance(5.0)
    assert read_history(store, "a") == RunHistory(ran_s=30.0, preemptions=1, started_s=started_s)


def test_a_job_that_ended_and_is_requeued_has_its_whole_time_limit_again(store: JobStore, clock: ManualClock) -> None:
    store.submit(submission("a"))
    attempt(store, clock, 50.0)
    store.expire("a", reason="reached its time limit")
    assert read_history(store, "a").ran_s == 50.0
    store.requeue("a")
    assert read_history(store, "a") == RunHistory()


def test_a_second_request_to_leave_changes_neither_event_nor_count(store: JobStore) -> None:
    store.submit(submission("a"))
    store.claim("a", "dispatcher", 30.0)
    store.preempt("a", workers=2)
    before = store.get("a").last_event
    store.preempt("a", workers=1)
    assert store.get("a").last_event == before
    assert (read_history(store, "a").resize_to, read_history(store, "a").preemptions) == (2, 0)
