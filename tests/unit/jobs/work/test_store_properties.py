"""Whatever workers and clients do, and however late: one holder at a time, legal histories, and always a way to an end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import IllegalTransitionError, LeaseLostError
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import Job, JobSubmission, Lease
from tandem.jobs.work.retries import RetryPolicy
from tandem.jobs.work.states import TRANSITIONS, Action, JobKind, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import StateChanged

REQUESTS = ("cancel", "pause", "resume", "hold", "release", "preempt", "requeue")
REPORTS = ("started", "finish", "fail", "fail for good", "stopped")
KINDS = st.sampled_from([kind for kind in JobKind if kind is not JobKind.GENERATE])
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(REQUESTS), st.none()),
    st.tuples(st.just("claim"), st.sampled_from("ab")),
    st.tuples(st.just("take over"), st.sampled_from("ab")),
    # The lease that a report is made under: the newest, or one from long ago.
    st.tuples(st.sampled_from(REPORTS), st.integers(0, 5)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 20.0, 40.0])),
)


def report(store: JobStore, lease: Lease, what: str) -> Job:
    calls: dict[str, Callable[[], Job]] = {
        "started": lambda: store.started(lease, "handle"),
        "finish": lambda: store.finish(lease, {}),
        "fail": lambda: store.fail(lease, "x", policy=RetryPolicy(first_s=1.0)),
        "fail for good": lambda: store.fail(lease, "x", retryable=False),
        "stopped": lambda: store.stopped(lease),
    }
    return calls[what]()


@given(
    kind=st.sampled_from([kind for kind in JobKind if kind is not JobKind.GENERATE]),
    operations=st.lists(OPERATIONS, max_size=25),
)
@settings(max_examples=60)
def test_late_writes_change_nothing_and_every_history_is_legal(
    kind: JobKind, operations: list[tuple[str, object]]
) -> None:
    clock = ManualClock(datetime(2026, 5, 4, 12, tzinfo=UTC))
    with JobStore("sqlite://", clock=clock) as store:
        job_id = store.submit(JobSubmission(kind=kind, name="x", spec={}, max_attempts=2)).job.id
        leases: list[Lease] = []
        for name, argument in operations:
            before = store.get(job_id)
            if name == "wait":
                clock.advance(float(str(argument)))
            elif name in ("claim", "take over"):
                call = store.claim if name == "claim" else store.take_over
                if (taken := call(job_id, str(argument), 30.0)) is not None and taken.lease is not None:
                    assert taken.lease.token > max((lease.token for lease in leases), default=0)
                    leases.append(taken.lease)
            elif name in REQUESTS:
                try:
                    getattr(store, name)(job_id)
                except IllegalTransitionError:
                    assert store.get(job_id) == before
            elif leases:
                lease = leases[-1 - int(str(argument)) % len(leases)]
                try:
                    report(store, lease, name)
                except (LeaseLostError, IllegalTransitionError):
                    assert store.get(job_id) == before
                else:
                    # Only the newest lease writes, and only while it is in force.
                    assert lease == leases[-1]
                    assert before.lease == lease or store.get(job_id) == before
        changes = [each.event for each in store.events(job_id, limit=1000) if isinstance(each.event, StateChanged)]
        for earlier, later in itertools.pairwise(changes):
            assert later.from_state == earlier.to_state
            assert TRANSITIONS[kind][State(earlier.to_state), Action(later.action)] == later.to_state
        job = store.get(job_id)
        assert job.state.active == (job.lease is not None)
        ended = store.cancel(job_id)
        if ended.lease is not None:
            ended = store.stopped(ended.lease)
        assert ended.state.ended and ended.ended_at is not None and ended.lease is None
