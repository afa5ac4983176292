"""Leadership by lease: one leader at a time, and late ones are refused. On SQLite and PostgreSQL."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tandem.errors import LeaseLostError
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.leader import DISPATCHER, Leadership, Term
from tandem.jobs.work.records import JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

JOB = JobSubmission(kind=JobKind.TRAIN, name="adapter", spec={})


def test_one_process_leads_until_its_lease_ends(leadership: Leadership, clock: ManualClock) -> None:
    first = leadership.acquire(DISPATCHER, "a", 15.0)
    assert first == Term(DISPATCHER, "a", 1)
    assert leadership.acquire(DISPATCHER, "b", 15.0) is None
    clock.advance(10.0)
    assert leadership.acquire(DISPATCHER, "a", 15.0) == first, "it goes on in the same term"
    clock.advance(10.0)
    assert leadership.acquire(DISPATCHER, "b", 15.0) is None
    clock.advance(5.0)
    assert leadership.acquire(DISPATCHER, "b", 15.0) == Term(DISPATCHER, "b", 2)
    assert leadership.acquire(DISPATCHER, "a", 15.0) is None
    assert leadership.acquire("other role", "a", 15.0) == Term("other role", "a", 1)


def test_of_processes_that_try_at_once_one_leads(url: str) -> None:
    with Leadership(url) as leadership, ThreadPoolExecutor(6) as threads:
        calls = [threads.submit(leadership.acquire, DISPATCHER, f"process {n}", 60.0) for n in range(6)]
        assert sum(call.result() is not None for call in calls) == 1


def test_a_leader_that_resigns_is_followed_at_once(leadership: Leadership) -> None:
    first = leadership.acquire(DISPATCHER, "a", 15.0)
    assert first is not None
    leadership.resign(first)
    second = leadership.acquire(DISPATCHER, "b", 15.0)
    assert second == Term(DISPATCHER, "b", 2)
    leadership.resign(first)
    assert leadership.acquire(DISPATCHER, "b", 15.0) == second, "the end of an old term ends no other"


def test_writes_of_an_earlier_leader_are_refused(leadership: Leadership, store: JobStore, clock: ManualClock) -> None:
    late = leadership.acquire(DISPATCHER, "a", 15.0)
    ours, waits = store.submit(JOB).job, store.submit(JOB).job
    claimed = store.claim(ours.id, "a", 3600.0, term=late)
    assert late is not None and claimed is not None and claimed.lease is not None
    clock.advance(15.0)
    term = leadership.acquire(DISPATCHER, "b", 15.0)
    with pytest.raises(LeaseLostError, match=r"a led as dispatcher in term 1; now b \(term 2\) does"):
        store.claim(waits.id, "a", 30.0, term=late)
    assert store.get(waits.id).state is State.QUEUED
    # The new leader need not wait for the end of the old one's leases.
    assert store.take_over(ours.id, "b", 30.0) is None
    taken = store.take_over(ours.id, "b", 30.0, term=term)
    assert taken is not None and taken.attempt == claimed.attempt
    with pytest.raises(LeaseLostError, match="now b"):
        store.started(claimed.lease, "handle")
    with pytest.raises(LeaseLostError, match="now b"):
        store.take_over(ours.id, "a", 30.0, term=late)
