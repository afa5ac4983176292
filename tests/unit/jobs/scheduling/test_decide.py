"""Decisions of the scheduler in small clusters."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.jobs.scheduling import (
    ClusterState,
    Decision,
    Grow,
    Hold,
    Job,
    Node,
    Placement,
    Policy,
    Preempt,
    Resources,
    Shrink,
    Start,
    Stop,
    Tenant,
    decide,
    explain,
)

WORKER = Resources(1, 1)
HOUR_S = 3600.0


def cluster(nodes: int = 2, *, gpus: int = 8, tenants: tuple[Tenant, ...] = (), **policy: Any) -> ClusterState:
    """A cluster of equal nodes."""
    return ClusterState(
        Policy(**policy), tenants, [Node(id=f"n{number}", cpus=64, gpus=gpus) for number in range(nodes)]
    )


def job(name: str, workers: int | tuple[int, ...] = 1, tenant: str = "lab", **changes: Any) -> Job:
    """A job with one GPU for each worker."""
    counts = workers if isinstance(workers, tuple) else (workers,)
    values = {"submitted_s": 0.0, "time_limit_s": HOUR_S, "worker": WORKER} | changes
    return Job(id=name, tenant=tenant, worker_counts=counts, **values)


def step(state: ClusterState, now: float) -> list[Decision]:
    """Decide, and apply all decisions."""
    decisions = decide(state, now)
    for decision in decisions:
        state.apply(decision, now)
    return decisions


def started(decisions: list[Decision]) -> dict[str, Placement]:
    return {decision.job_id: decision.placement for decision in decisions if isinstance(decision, Start)}


def holds(decisions: list[Decision]) -> dict[str, Hold]:
    return {decision.job_id: decision for decision in decisions if isinstance(decision, Hold)}


def test_a_gang_starts_with_all_workers_on_the_fullest_node_that_holds_it() -> None:
    state = cluster()
    state.submit(job("small", 3), 0)
    assert started(step(state, 0)) == {"small": (("n0", 3),)}
    state.submit(job("five", 5), 1)
    assert started(step(state, 1)) == {"five": (("n0", 5),)}


def test_a_gang_that_does_not_fit_waits_with_the_numbers_and_the_time() -> None:
    state = cluster(1)
    state.submit(job("running", 2), 0)
    step(state, 0)
    state.submit(job("gang", 8), 10)
    hold = holds(step(state, 10))["gang"]
    assert hold.expected_s == HOUR_S
    assert hold.reason == "waits for 8 GPUs; 6 are free for it, enough by 1970-01-01 01:00 UTC at the latest"


def test_a_gang_larger_than_the_cluster_is_held_and_keeps_nobody_waiting() -> None:
    state = cluster(1)
    state.submit(job("huge", 16), 0)
    state.submit(job("one"), 1)
    decisions = step(state, 1)
    assert started(decisions) == {"one": (("n0", 1),)}
    assert "in an empty cluster 8 are free for it. Add nodes" in holds(decisions)["huge"].reason


def test_reasons_tell_no_tenant_of_the_jobs_of_another() -> None:
    state = cluster(1, tenants=(Tenant(name="rival", quota_cpus=64, quota_gpus=8),))
    state.submit(job("running", 4, preemptible=False), 0)
    step(state, 0)
    state.submit(job("fusion-secret", 8, tenant="rival", submitted_s=1.0), 1)
    state.submit(job("large", 5, submitted_s=2.0), 1)
    state.submit(job("long", 2, tenant="other", submitted_s=3.0, time_limit_s=20 * HOUR_S), 2)
    state.submit(job("short", 2, tenant="third", submitted_s=4.0, time_limit_s=HOUR_S / 2), 3)
    waiting = holds(decide(state, 3))
    said = [waiting["large"].reason, waiting["long"].reason]
    said += [decision.reason for decision in decide(state, 3) if isinstance(decision, Start)]
    assert [reason for reason in said if "a job of another tenant" not in reason] == []
    assert len(said) == 3 and not any("fusion" in reason or "rival" in reason for reason in said)


def test_workers_of_a_group_share_a_node() -> None:
    state = cluster(2)
    state.submit(job("a", 5), 0)
    state.submit(job("b", 5, submitted_s=1.0), 0)
    step(state, 0)
    state.submit(job("tensor", 4, workers_per_node=4, submitted_s=2.0), 1)
    assert started(step(state, 1)) == {}
    assert state.cancel("lab", "tensor", 1).id == "tensor"
    state.submit(job("pairs", 4, workers_per_node=2, submitted_s=2.0), 1)
    assert started(step(state, 1)) == {"pairs": (("n0", 2), ("n1", 2))}


def test_a_short_job_is_backfilled_and_a_long_one_is_not() -> None:
    state = cluster(1)
    state.submit(job("running", 4), 0)
    step(state, 0)
    state.submit(job("first", 8), 1)
    state.submit(job("long", 2, submitted_s=1.0, time_limit_s=2 * HOUR_S), 1)
    state.submit(job("short", 2, submitted_s=2.0, time_limit_s=HOUR_S / 2), 2)
    (start, hold) = step(state, 2)
    assert isinstance(start, Start)
    assert (start.job_id, start.reason) == ("short", "fits beside job first without delaying it")
    assert isinstance(hold, Hold)


def test_backfill_leaves_reserved_gpus_alone_beyond_the_reservation() -> None:
    state = cluster(1)
    state.submit(job("running", 4), 0)
    step(state, 0)
    state.submit(job("first", 6), 1)
    state.submit(job("two", 2, submitted_s=1.0, time_limit_s=9 * HOUR_S), 1)
    state.submit(job("two more", 2, submitted_s=2.0, time_limit_s=9 * HOUR_S), 2)
    decisions = step(state, 2)
    assert set(started(decisions)) == {"two"}
    assert "would let it start now" in explain(state, "lab", "two more", 2).reason


def test_the_reason_of_a_job_that_would_delay_the_first_names_the_limit_that_lets_it_start() -> None:
    state = cluster(1)
    state.submit(job("running", 4), 0)
    step(state, 0)
    state.submit(job("first", 8), 1)
    step(state, 1)
    state.submit(job("long", 2, submitted_s=2.0, time_limit_s=4 * HOUR_S), 1800)
    state.submit(job("also long", 2, submitted_s=3.0, time_limit_s=4 * HOUR_S), 1800)
    hold = explain(state, "lab", "long", 1800)
    assert (
        "by its time limit of 4:00:00 it may run beyond 1970-01-01 01:00 UTC, when job first gets them" in hold.reason
    )
    assert "A time limit that ends by then would let it start now" in hold.reason
    assert explain(state, "lab", "also long", 1800).reason.startswith(
        "waits behind 2 jobs of tenant lab, of which the first"
    )


def test_a_job_over_its_time_limit_is_stopped_once_and_its_gpus_go_to_the_next() -> None:
    state = cluster(1)
    state.submit(job("limited", 8), 0)
    step(state, 0)
    (stop,) = step(state, HOUR_S)
    assert isinstance(stop, Stop)
    assert stop.reason == "reached its time limit of 1:00:00. Submit it again with a higher limit to go on"
    state.submit(job("next", 8), HOUR_S + 1)
    assert started(step(state, HOUR_S + 1)) == {}
    state.finished("limited", HOUR_S + 2)
    assert set(started(step(state, HOUR_S + 2))) == {"next"}


def test_a_job_with_an_estimate_alone_is_not_stopped() -> None:
    state = cluster(1)
    state.submit(job("estimated", 8, time_limit_s=None, estimate_s=60.0), 0)
    step(state, 0)
    assert step(state, HOUR_S) == []


def test_the_time_limit_counts_all_starts_of_a_job() -> None:
    state = cluster(1)
    state.submit(job("stopped", 8), 0)
    step(state, 0)
    state.apply(Preempt(job_id="stopped", reason="test"), 1800)
    requeued = state.preempted("stopped", 1800)
    assert requeued is not None
    assert (requeued.ran_s, requeued.preemptions) == (1800, 1)
    step(state, 2000)
    assert not [decision for decision in decide(state, 3799) if isinstance(decision, Stop)]
    assert [decision for decision in decide(state, 3800) if isinstance(decision, Stop)]


def test_a_preempted_job_whose_time_limit_is_used_up_does_not_wait_again() -> None:
    state = cluster(1)
    state.submit(job("limited", 8), 0)
    step(state, 0)
    state.apply(Preempt(job_id="limited", reason="test"), HOUR_S - 10)
    assert state.preempted("limited", HOUR_S + 20) is None
    assert decide(state, HOUR_S + 20) == []


def test_tenants_with_equal_weights_share_the_cluster_whatever_each_submits() -> None:
    state = cluster(2)
    for number in range(30):
        state.submit(job(f"a{number:02}", tenant="a"), 0)
    for number in range(9):
        state.submit(job(f"b{number}", tenant="b", submitted_s=1.0), 1)
    names = started(step(state, 1))
    assert sum(name.startswith("a") for name in names) == 8
    assert sum(name.startswith("b") for name in names) == 8


def test_a_tenant_with_twice_the_weight_gets_twice_the_gpus() -> None:
    state = cluster(3, gpus=4, tenants=(Tenant(name="a", weight=2.0), Tenant(name="b")))
    for number in range(20):
        state.submit(job(f"a{number:02}", tenant="a"), 0)
        state.submit(job(f"b{number:02}", tenant="b"), 0)
    names = started(step(state, 0))
    assert sum(name.startswith("a") for name in names) == 8
    assert sum(name.startswith("b") for name in names) == 4


def test_past_use_counts_against_a_tenant_and_fades() -> None:
    state = cluster(1, gpus=2, half_life_s=HOUR_S)
    state.submit(job("big", 2, tenant="a", time_limit_s=10 * HOUR_S), 0)
    step(state, 0)
    state.finished("big", 2 * HOUR_S)
    account = state.accounts["a"]
    assert account.weighted_share(state.total, 2 * HOUR_S) == pytest.approx(0.75)
    assert account.weighted_share(state.total, 4 * HOUR_S) == pytest.approx(0.75 / 4)


def test_an_idle_share_is_borrowed_and_given_back_when_its_tenant_returns() -> None:
    state = cluster(1, tenants=(Tenant(name="a"), Tenant(name="b")))
    for number in range(4):
        state.submit(job(f"a{number}", 2, tenant="a", submitted_s=float(number), time_limit_s=10 * HOUR_S), 0)
    assert len(started(step(state, 0))) == 4
    state.submit(job("owner", 2, tenant="b", submitted_s=1000.0), 1000)
    early = step(state, 1000)
    assert [type(decision) for decision in early] == [Hold]
    (preempt, hold) = step(state, 1300)
    assert isinstance(preempt, Preempt)
    assert preempt.reason == "gives way to a job of another tenant, priority 0"
    assert preempt.for_job == "owner"
    assert isinstance(hold, Hold)
    assert hold.job_id == "owner"
    # Nothing more is stopped while that run leaves.
    assert [type(decision) for decision in step(state, 1310)] == [Hold]
    state.preempted(preempt.job_id, 1340)
    assert set(started(step(state, 1340))) == {"owner"}


def test_a_tenant_within_its_quota_keeps_its_runs() -> None:
    state = cluster(1, tenants=(Tenant(name="a"), Tenant(name="b")))
    state.submit(job("a", 4, tenant="a", time_limit_s=10 * HOUR_S, priority=-5), 0)
    state.submit(job("b", 2, tenant="b", time_limit_s=10 * HOUR_S, priority=5), 0)
    step(state, 0)
    state.submit(job("more", 4, tenant="b", priority=5, submitted_s=0.0), 5000)
    assert [type(decision) for decision in step(state, 5000)] == [Hold]


def test_a_higher_job_of_the_same_tenant_preempts_the_lowest_and_youngest() -> None:
    state = cluster(1)
    state.submit(job("old", 4, time_limit_s=10 * HOUR_S), 0)
    step(state, 0)
    state.submit(job("young", 4, submitted_s=5.0, time_limit_s=10 * HOUR_S), 5)
    step(state, 5)
    state.submit(job("urgent", 4, priority=1, submitted_s=600.0), 600)
    step(state, 600)
    preempted = [each.job_id for each in step(state, 1000) if isinstance(each, Preempt)]
    assert preempted == ["young"]


@pytest.mark.parametrize(
    "protection", [{"preemptible": False}, {"preemptions": 3}], ids=["not preemptible", "preempted often enough"]
)
def test_a_protected_run_is_not_preempted(protection: dict[str, Any]) -> None:
    state = cluster(1)
    state.submit(job("protected", 8, time_limit_s=10 * HOUR_S, **protection), 0)
    step(state, 0)
    state.submit(job("urgent", 8, priority=1), 2000)
    assert [type(decision) for decision in step(state, 2000)] == [Hold]


def test_a_run_that_has_just_started_is_not_preempted() -> None:
    state = cluster(1)
    state.submit(job("low", 8, time_limit_s=10 * HOUR_S), 0)
    step(state, 1000)
    state.submit(job("urgent", 8, priority=1), 1001)
    assert [type(decision) for decision in step(state, 1500)] == [Hold]
    assert [type(decision) for decision in step(state, 1600)] == [Preempt, Hold]


def test_a_tenant_never_exceeds_its_limit() -> None:
    state = cluster(1, tenants=(Tenant(name="lab", limit_gpus=4),))
    state.submit(job("a", 3), 0)
    state.submit(job("b", 2), 0)
    state.submit(job("c", 1), 0)
    decisions = step(state, 0)
    assert set(started(decisions)) == {"a", "c"}
    assert "tenant lab holds 3 GPUs and 3 CPUs, and its limit is 4 GPUs" in holds(decisions)["b"].reason


def test_backfill_leaves_room_in_the_limit_of_the_first_jobs_tenant() -> None:
    state = cluster(1, tenants=(Tenant(name="lab", limit_gpus=4), Tenant(name="other")))
    state.submit(job("running", 6, tenant="other"), 0)
    step(state, 0)
    state.submit(job("first", 4), 1)
    state.submit(job("small", 1, submitted_s=1.0, time_limit_s=60.0), 1)
    assert started(step(state, 1)) == {}


def test_backfilled_jobs_do_not_cost_their_tenants_first_job_its_place() -> None:
    state = cluster(1, tenants=(Tenant(name="a"), Tenant(name="b")))
    state.submit(job("running", 6, tenant="c"), 0)
    step(state, 0)
    state.submit(job("first", 4, tenant="a"), 1)
    state.submit(job("filler", 2, tenant="a", submitted_s=1.0, time_limit_s=600.0), 1)
    assert set(started(step(state, 1))) == {"filler"}
    state.submit(job("rival", 4, tenant="b", submitted_s=2.0), 2)
    state.finished("running", 100)
    assert "first" in started(step(state, 100))


def test_age_raises_priority_among_the_jobs_of_a_tenant() -> None:
    state = cluster(1, aging_s=HOUR_S)
    state.submit(job("old and low", 8, priority=-1), 0)
    state.submit(job("new and normal", 8, submitted_s=2 * HOUR_S), 2 * HOUR_S)
    assert set(started(step(state, 2 * HOUR_S))) == {"old and low"}


def test_a_starved_job_precedes_jobs_within_their_quota() -> None:
    state = cluster(1, tenants=(Tenant(name="a"), Tenant(name="b")), starvation_s=HOUR_S)
    state.submit(job("filler", 1, tenant="b", time_limit_s=10 * HOUR_S), 0)
    step(state, 0)
    state.submit(job("whole node", 8, tenant="a"), 0)
    state.submit(job("b1", 1, tenant="b", submitted_s=1.0, time_limit_s=24 * HOUR_S), HOUR_S)
    decisions = step(state, HOUR_S)
    assert started(decisions) == {}
    assert holds(decisions)["whole node"].expected_s == 10 * HOUR_S


def test_an_elastic_run_starts_small_in_a_full_cluster_and_takes_what_nobody_waits_for() -> None:
    state = cluster(1)
    state.submit(job("elastic", (2, 4, 8), time_limit_s=20 * HOUR_S), 0)
    assert started(step(state, 0)) == {"elastic": (("n0", 8),)}
    state.submit(job("fixed", 4, submitted_s=1.0), 1)
    assert [type(decision) for decision in step(state, 2000)] == [Shrink, Hold]
    assert state.runs["elastic"].shrinking_to == (("n0", 4),)
    state.resized("elastic", 2030)
    assert set(started(step(state, 2030))) == {"fixed"}
    state.finished("fixed", 2100)
    assert step(state, 2100) == []
    (grow,) = step(state, 2030 + 600)
    assert isinstance(grow, Grow)
    assert grow.placement == (("n0", 8),)


def test_nothing_changes_when_nothing_happened() -> None:
    state = cluster(1)
    state.submit(job("a", 6), 0)
    state.submit(job("b", 6), 0)
    step(state, 0)
    again = decide(state, 0)
    assert [type(decision) for decision in again] == [Hold]
    assert decide(state, 0) == again


def test_a_scheduler_that_starts_anew_goes_on_from_the_runs_that_it_adopts() -> None:
    state = cluster(1)
    state.submit(job("a", 6), 0)
    step(state, 0)
    successor = cluster(1)
    for run in state.runs.values():
        successor.adopt(run, 100)
    for each in (state, successor):
        each.submit(job("b", 6), 100)
    assert [(each.job_id, each.expected_s) for each in decide(successor, 100) if isinstance(each, Hold)] == [
        ("b", HOUR_S)
    ]
    assert decide(successor, 100) == decide(state, 100)


def test_a_lost_node_takes_its_free_gpus_along_and_its_runs_wait_again() -> None:
    state = cluster(2)
    state.submit(job("a", 8), 0)
    step(state, 0)
    state.set_nodes([Node(id="n1", cpus=64, gpus=8)])
    requeued = state.preempted("a", 10)
    assert requeued is not None
    assert requeued.preemptions == 0
    assert started(step(state, 10)) == {"a": (("n1", 8),)}
