"""Jobs in the database: submitted once, leased to one holder, ended in every way. On SQLite and PostgreSQL."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from tandem.db.backup import backup, restore
from tandem.errors import (
    IdempotencyConflictError,
    IllegalTransitionError,
    JobError,
    LeaseLostError,
    UnknownJobError,
)
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import Job, JobSubmission, Lease
from tandem.jobs.work.retries import RetryPolicy
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import Notice, StateChanged, Step

TRAIN = JobSubmission(kind=JobKind.TRAIN, name="adapter", spec={"steps": 20}, content_hash="c" * 64, tenant="lab")
ONE_OFF = replace(TRAIN, content_hash=None)


def running(store: JobStore, submission: JobSubmission = ONE_OFF, owner: str = "a") -> tuple[Job, Lease]:
    """A job that runs, and its lease."""
    job = store.submit(submission).job
    claimed = store.claim(job.id, owner, 30.0)
    assert claimed is not None and claimed.lease is not None
    return store.started(claimed.lease, f"handle {claimed.run_name}"), claimed.lease


def history(store: JobStore, job: Job) -> list[str]:
    """The states that a job had."""
    return [each.event.to_state for each in store.events(job.id) if isinstance(each.event, StateChanged)]


# ---- submission ----


def test_the_same_content_of_a_tenant_is_one_job(store: JobStore) -> None:
    first, second = store.submit(TRAIN), store.submit(replace(TRAIN, key_id="key_2"))
    assert first.is_new and not second.is_new and first.job == second.job
    other = store.submit(replace(TRAIN, tenant="other"))
    assert other.is_new and other.job.id != first.job.id


def test_without_a_content_hash_each_submission_is_a_job_of_its_own(store: JobStore) -> None:
    assert store.submit(ONE_OFF).job.id != store.submit(ONE_OFF).job.id


def test_an_idempotency_key_makes_one_job_for_each_tenant(store: JobStore) -> None:
    keyed = replace(ONE_OFF, idempotency_key="k" * 300)
    first = store.submit(keyed).job
    assert store.submit(keyed).job == first and not store.submit(keyed).is_new
    assert store.submit(replace(keyed, tenant="other")).is_new
    with pytest.raises(IdempotencyConflictError, match=f"made the job {first.id}"):
        store.submit(replace(keyed, spec={"steps": 21}))
    # Whatever became of the job, the answer to the same request is the same job as it is.
    store.cancel(first.id)
    assert store.submit(keyed).job.state is State.CANCELLED


def test_two_gateways_that_get_the_same_submission_at_once_make_one_job(url: str) -> None:
    submissions = [TRAIN, replace(ONE_OFF, idempotency_key="once")]
    stores = [JobStore(url) for _ in range(4)]
    with ThreadPoolExecutor(8) as threads:
        for submission in submissions:
            calls = [threads.submit(each.submit, submission) for each in stores * 2]
            answers = [call.result() for call in calls]
            assert len({answer.job.id for answer in answers}) == 1
            assert sum(answer.is_new for answer in answers) == 1
    assert len(stores[0].page().jobs) == 2
    for each in stores:
        each.close()


def test_the_same_content_again_continues_a_job_that_did_not_succeed(store: JobStore) -> None:
    job, lease = running(store, TRAIN)
    assert store.submit(TRAIN).job.state is State.RUNNING
    assert store.fail(lease, "no such column", retryable=False).state is State.FAILED
    again = store.submit(TRAIN)
    assert (again.is_new, again.job.id, again.job.state, again.job.failures) == (False, job.id, State.QUEUED, 0)
    # The next attempt has another name than the one before: runners tell them apart.
    claimed = store.claim(job.id, "a", 30.0)
    assert claimed is not None and claimed.lease is not None
    assert claimed.run_name != job.run_name
    store.finish(claimed.lease, {"model": "adapter@1"})
    finished = store.submit(TRAIN).job
    assert finished.state is State.FINISHED and finished.result == {"model": "adapter@1"}


def test_an_id_that_another_job_has_is_refused(store: JobStore) -> None:
    store.submit(replace(ONE_OFF, id="mine"))
    for taken in (replace(ONE_OFF, id="mine"), replace(TRAIN, id="mine", tenant="other")):
        with pytest.raises(JobError, match="'mine' belongs to another job"):
            store.submit(taken)


# ---- leases ----


def test_a_job_is_claimed_by_one_of_many(url: str) -> None:
    with JobStore(url) as store, ThreadPoolExecutor(6) as threads:
        for _ in range(5):
            job = store.submit(ONE_OFF).job
            claims = [threads.submit(store.claim, job.id, f"owner {n}", 30.0) for n in range(6)]
            won = [claim.result() for claim in claims if claim.result() is not None]
            assert len(won) == 1 and won[0] is not None and won[0].attempt == 1


def test_a_late_holder_is_refused_and_changes_nothing(store: JobStore, clock: ManualClock) -> None:
    job, late = running(store)
    assert store.take_over(job.id, "b", 30.0) is None, "the lease is in force"
    clock.advance(31.0)
    taken = store.take_over(job.id, "b", 30.0)
    assert taken is not None and taken.lease is not None and taken.lease.token > late.token
    assert taken.run_name == job.run_name, "it is the same attempt"
    before = store.get(job.id)
    writes = (
        lambda: store.started(late, "x"),
        lambda: store.finish(late, {}),
        lambda: store.fail(late, "x"),
        lambda: store.stopped(late),
        lambda: store.append(late, [Notice(message="x")]),
    )
    for write in writes:
        with pytest.raises(LeaseLostError, match=r"a held .* with token 1; now b \(token 2\) does.*Stop working"):
            write()
    assert store.renew([late, taken.lease], 30.0) == ([before], [late])
    assert store.get(job.id) == before and store.events(job.id, after=before.last_event) == []


def test_a_lease_that_has_run_out_is_in_force_until_somebody_takes_the_job(store: JobStore, clock: ManualClock) -> None:
    _, lease = running(store)
    clock.advance(1000.0)
    assert store.finish(lease).state is State.FINISHED


def test_a_report_that_is_sent_again_changes_nothing(store: JobStore) -> None:
    _, lease = running(store)
    first = store.fail(lease, "lost connection")
    assert store.fail(lease, "lost connection") == first and first.failures == 1
    _, lease = running(store)
    done = store.finish(lease, {"loss": 1.5})
    assert store.finish(lease, {"loss": 1.5}) == done == store.stopped(lease)


def test_tokens_grow_over_all_attempts(store: JobStore, clock: ManualClock) -> None:
    job, lease = running(store)
    tokens = [lease.token]
    for _ in range(2):
        store.fail(store_lease(store, job), "x", policy=RetryPolicy(first_s=1.0))
        clock.advance(10.0)
        claimed = store.claim(job.id, "a", 30.0)
        assert claimed is not None and claimed.lease is not None
        tokens.append(claimed.lease.token)
    assert tokens == sorted(set(tokens))


def store_lease(store: JobStore, job: Job) -> Lease:
    lease = store.get(job.id).lease
    assert lease is not None
    return lease


# ---- failures ----


def test_a_failed_attempt_waits_longer_each_time_and_is_a_dead_letter_at_last(
    store: JobStore, clock: ManualClock
) -> None:
    policy = RetryPolicy(first_s=10.0, jitter=0.5)
    job = store.submit(replace(ONE_OFF, max_attempts=3)).job
    for delay_s in (10.0, 20.0):
        claimed = store.claim(job.id, "a", 30.0)
        assert claimed is not None and claimed.lease is not None
        failed = store.fail(claimed.lease, "no memory", policy=policy, draw=0.0)
        assert (failed.state, failed.error) == (State.QUEUED, "no memory")
        assert failed.not_before == clock.now() + timedelta(seconds=delay_s)
        assert store.claim(job.id, "a", 30.0) is None and store.waiting() == []
        clock.advance(delay_s)
        assert [each.id for each in store.waiting()] == [job.id]
    claimed = store.claim(job.id, "a", 30.0)
    assert claimed is not None and claimed.lease is not None
    dead = store.fail(claimed.lease, "no memory")
    assert (dead.state, dead.attempt, dead.ended_at) == (State.DEAD, 3, clock.now())
    again = store.requeue(job.id)
    assert (again.state, again.failures, again.error, again.ended_at) == (State.QUEUED, 0, None, None)


# ---- requests ----


def test_a_cancel_in_each_state_ends_as_cancelled(store: JobStore) -> None:
    assert store.cancel(store.submit(ONE_OFF).job.id).state is State.CANCELLED
    assert store.cancel(store.submit(replace(ONE_OFF, held=True)).job.id).state is State.CANCELLED
    for before in ([], [store.pause], [store.preempt], [store.pause, store.resume]):
        job, lease = running(store)
        for request in before:
            request(job.id)
        assert store.cancel(job.id, reason="by ann").state is State.STOPPING
        assert store.renew([lease], 30.0).held[0].state.leaving
        assert store.cancel(job.id).reason == "by ann"
        ended = store.stopped(lease)
        assert (ended.state, ended.lease) == (State.CANCELLED, None)
        assert store.cancel(job.id) == ended


def test_a_paused_job_goes_on_when_it_is_resumed(store: JobStore) -> None:
    job, lease = running(store)
    assert store.pause(job.id).state is State.PAUSING
    assert store.stopped(lease).state is State.PAUSED
    assert store.waiting() == []
    assert store.resume(job.id).state is State.QUEUED
    assert history(store, job) == ["queued", "starting", "running", "pausing", "paused", "queued"]
    export = store.submit(replace(ONE_OFF, kind=JobKind.EXPORT)).job
    with pytest.raises(
        IllegalTransitionError, match="'pause' is not possible for work of kind 'export' in state 'queued'"
    ):
        store.pause(export.id)
    assert store.get(export.id) == export


def test_a_start_that_a_request_overtook_leaves_the_request_in_force(store: JobStore) -> None:
    job = store.submit(ONE_OFF).job
    claimed = store.claim(job.id, "a", 30.0)
    assert claimed is not None and claimed.lease is not None
    store.cancel(job.id)
    started = store.started(claimed.lease, "handle")
    assert (started.state, started.handle) == (State.STOPPING, "handle")


def test_a_job_whose_deadline_has_passed_expires(store: JobStore, clock: ManualClock) -> None:
    soon = replace(ONE_OFF, deadline=clock.now() + timedelta(hours=24))
    waits, (runs, lease), later = store.submit(soon).job, running(store, soon), store.submit(ONE_OFF).job
    assert store.expire_overdue() == []
    clock.advance(24 * 3600.0)
    assert store.claim(waits.id, "a", 30.0) is None
    assert {job.id: job.state for job in store.expire_overdue()} == {
        waits.id: State.EXPIRED,
        runs.id: State.EXPIRING,
    }
    assert store.expire_overdue() == [] and store.get(later.id).state is State.QUEUED
    assert store.stopped(lease).state is State.EXPIRED
    again = store.requeue(waits.id)
    assert (again.state, again.deadline) == (State.QUEUED, None), "it does not expire once more"


def test_reasons_of_more_jobs_than_a_statement_has_parameters_are_recorded(store: JobStore) -> None:
    job = store.submit(ONE_OFF).job
    store.explain({f"other-{number}": "waits" for number in range(70_000)} | {job.id: "waits for 2 GPUs"})
    assert store.get(job.id).reason == "waits for 2 GPUs"


def test_a_decision_about_an_earlier_attempt_changes_nothing(store: JobStore) -> None:
    job, lease = running(store)
    store.preempt(job.id, attempt=1)
    store.stopped(lease)
    assert store.claim(job.id, "b", 30.0) is not None
    for decide in (store.preempt, store.expire):
        with pytest.raises(IllegalTransitionError, match="about attempt 1; the job is in attempt 2"):
            decide(job.id, attempt=1)
    assert store.get(job.id).state is State.STARTING


def test_waiting_jobs_are_ordered_by_priority_then_submission(store: JobStore) -> None:
    ids = [store.submit(replace(ONE_OFF, priority=priority)).job.id for priority in (5, 0, 5, -1)]
    assert [job.id for job in store.waiting()] == [ids[3], ids[1], ids[0], ids[2]]
    store.explain({ids[0]: "waits for 8 GPUs; 6 are free"})
    assert store.get(ids[0]).reason == "waits for 8 GPUs; 6 are free"


def test_a_tenant_s_long_queue_does_not_hide_the_jobs_of_others(store: JobStore) -> None:
    for tenant in ("a", "a", "a", "b"):
        store.submit(JobSubmission(kind=JobKind.TRAIN, name="x", spec={}, tenant=tenant))
    assert [job.tenant for job in store.waiting(limit=2)] == ["a", "a", "b"]


# ---- reading ----


def test_pages_hold_the_jobs_of_one_tenant_newest_first(store: JobStore) -> None:
    ids = [store.submit(ONE_OFF).job.id for _ in range(5)]
    other = store.submit(replace(ONE_OFF, tenant="other", kind=JobKind.BATCH)).job.id
    first = store.page(tenant="lab", limit=3)
    assert [job.id for job in first.jobs] == ids[:1:-1] and first.has_more
    second = store.page(tenant="lab", limit=3, after=first.jobs[-1].id)
    assert [job.id for job in second.jobs] == ids[1::-1] and not second.has_more
    assert [job.id for job in store.page(kinds=[JobKind.BATCH]).jobs] == [other]
    assert len(store.page(states=[State.QUEUED]).jobs) == 6
    for foreign in (lambda: store.get(other, tenant="lab"), lambda: store.page(tenant="lab", after=other)):
        with pytest.raises(UnknownJobError, match="There is no job"):
            foreign()


def test_events_are_numbered_without_gaps_and_paged_from_a_number_on(store: JobStore) -> None:
    job, lease = running(store)
    store.append(lease, [Step(step=n, loss=1.0 / n) for n in (1, 2, 3)])
    store.finish(lease)
    events = store.events(job.id)
    assert [each.number for each in events] == list(range(1, 8))
    assert [each.event.step for each in events if isinstance(each.event, Step)] == [1, 2, 3]
    assert all(each.event.time is not None for each in events)
    assert store.events(job.id, after=3, limit=2) == events[3:5]
    with pytest.raises(LeaseLostError, match="now nobody does, and it is finished"):
        store.append(lease, [Step(step=4)])


def test_holders_that_append_at_once_get_numbers_of_their_own(url: str) -> None:
    with JobStore(url) as store, ThreadPoolExecutor(4) as threads:
        job, lease = running(store)
        calls = [threads.submit(store.append, lease, [Notice(message=str(n))] * 3) for n in range(12)]
        assert len({call.result() for call in calls}) == 12
        assert [each.number for each in store.events(job.id)] == list(range(1, 3 + 36 + 1))


def test_after_a_restore_jobs_go_on_and_none_is_doubled(
    store: JobStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job, lease = running(store, TRAIN)
    waits = store.submit(replace(ONE_OFF, idempotency_key="once")).job
    backup(store.url, tmp_path / "b.gz")
    empty = f"sqlite:///{tmp_path}/restored.db"
    if not store.url.startswith("sqlite"):
        empty = request.getfixturevalue("postgresql_server").create(uuid.uuid4().hex)
    restore(empty, tmp_path / "b.gz")
    with JobStore(empty, clock=store.clock) as restored:
        assert restored.page() == store.page() and restored.events(job.id) == store.events(job.id)
        assert restored.submit(TRAIN).job == job
        assert restored.submit(replace(ONE_OFF, idempotency_key="once")).job == waits
        assert restored.submit(ONE_OFF).job.number > waits.number
        assert restored.take_over(job.id, "b", 30.0) is None, "its holder may still run"
        assert restored.finish(lease).state is State.FINISHED
