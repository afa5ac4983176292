"""Serving and training on one cluster: replicas take what they need from training, and give it back."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.jobs.scheduling import (
    ClusterState,
    Decision,
    Grow,
    Job,
    Node,
    Policy,
    Preempt,
    ReleaseReplicas,
    Resources,
    ServingDemand,
    Shrink,
    Start,
    StartReplicas,
    decide,
)

LONG_S = 100 * 3600.0


def cluster(nodes: int = 1, **policy: Any) -> ClusterState:
    return ClusterState(Policy(**policy), nodes=[Node(id=f"n{number}", cpus=64, gpus=8) for number in range(nodes)])


def job(name: str, *counts: int, **changes: Any) -> Job:
    values = {"submitted_s": 0.0, "time_limit_s": LONG_S, "worker": Resources(1, 1), "tenant": "lab"} | changes
    return Job(id=name, worker_counts=counts, **values)


def demand(replicas: int, gpus: float = 2.0, **changes: Any) -> ServingDemand:
    return ServingDemand(
        app="app", model="m", replicas=replicas, replica=Resources(1, gpus), **{"priority": 10} | changes
    )


def step(state: ClusterState, now: float) -> list[Decision]:
    decisions = decide(state, now)
    for decision in decisions:
        state.apply(decision, now)
    return decisions


def kinds(decisions: list[Decision]) -> list[type]:
    return [type(decision) for decision in decisions]


def test_replicas_start_on_free_gpus_before_waiting_jobs() -> None:
    state = cluster()
    state.submit(job("a", 8), 0)
    state.set_serving(demand(3), 0)
    (replicas, hold) = step(state, 0)
    assert replicas == StartReplicas(app="app", model="m", nodes=("n0", "n0", "n0"))
    assert hold.job_id == "a"  # type: ignore[union-attr]


def test_an_elastic_run_shrinks_for_a_replica_and_grows_when_it_is_given_back() -> None:
    state = cluster()
    state.submit(job("elastic", 2, 4, 8), 0)
    step(state, 0)
    state.set_serving(demand(1), 1000)
    (shrink,) = step(state, 1000)
    assert shrink == Shrink(job_id="elastic", placement=(("n0", 4),), reason="m of app needs 1 more replica")
    assert step(state, 1010) == []
    state.resized("elastic", 1030)
    assert kinds(step(state, 1030)) == [StartReplicas]
    state.set_serving(demand(0), 2000)
    assert step(state, 2299) == []
    assert kinds(step(state, 2300)) == [ReleaseReplicas]
    (grow,) = step(state, 2301)
    assert grow == Grow(job_id="elastic", placement=(("n0", 8),), reason="takes what no job waits for")


def test_the_run_that_loses_least_work_is_stopped_for_a_replica() -> None:
    state = cluster()
    state.submit(job("cannot save", 4, checkpoint_cost_s=None), 0)
    state.submit(job("can save", 4), 0)
    step(state, 0)
    state.set_serving(demand(1), 5000)
    (preempt,) = step(state, 5000)
    assert isinstance(preempt, Preempt)
    assert preempt.job_id == "can save"


def test_of_runs_that_lose_as_much_the_youngest_is_stopped() -> None:
    state = cluster()
    state.submit(job("old", 4), 0)
    step(state, 0)
    state.submit(job("young", 4), 50)
    step(state, 50)
    state.set_serving(demand(1), 5000)
    assert [each.job_id for each in step(state, 5000) if isinstance(each, Preempt)] == ["young"]


def test_no_more_runs_are_stopped_than_replicas_need() -> None:
    state = cluster(2)
    for number in range(16):
        state.submit(job(f"one-{number:02}", 1), 0)
    step(state, 0)
    state.set_serving(demand(1, gpus=4.0), 5000)
    decisions = step(state, 5000)
    assert kinds(decisions) == [Preempt] * 4
    nodes = {state.runs[each.job_id].placement[0][0] for each in decisions if isinstance(each, Preempt)}
    assert len(nodes) == 1


def test_gpus_that_a_replica_waits_for_go_to_no_job() -> None:
    state = cluster()
    state.submit(job("a", 6), 0)
    step(state, 0)
    state.set_serving(demand(1, gpus=4.0), 5000)
    assert kinds(step(state, 5000)) == [Preempt]
    state.submit(job("small", 1, submitted_s=5001.0, time_limit_s=10.0), 5001)
    assert not [each for each in step(state, 5001) if isinstance(each, Start)]
    state.preempted("a", 5030)
    decisions = step(state, 5030)
    assert decisions[0] == StartReplicas(app="app", model="m", nodes=("n0",))
    assert [each.job_id for each in decisions if isinstance(each, Start)] == ["small"]


def test_training_of_a_higher_priority_than_serving_stays() -> None:
    state = cluster()
    state.submit(job("important", 8, priority=20), 0)
    step(state, 0)
    state.set_serving(demand(1), 5000)
    assert step(state, 5000) == []


def test_as_many_replicas_start_as_can() -> None:
    state = cluster()
    state.submit(job("fixed", 4, preemptible=False), 0)
    state.submit(job("other", 4), 0)
    step(state, 0)
    state.set_serving(demand(3), 5000)
    assert kinds(step(state, 5000)) == [Preempt]
    state.preempted("other", 5030)
    assert step(state, 5030)[0] == StartReplicas(app="app", model="m", nodes=("n0", "n0"))


def test_a_replica_that_is_needed_again_in_time_is_kept() -> None:
    state = cluster()
    state.set_serving(demand(2), 0)
    step(state, 0)
    state.set_serving(demand(1), 100)
    state.set_serving(demand(2), 300)
    state.set_serving(demand(1), 350)
    assert step(state, 500) == []
    assert step(state, 650) == [ReleaseReplicas(app="app", model="m", nodes=("n0",))]


def test_replicas_of_another_size_are_refused_while_old_ones_are_there() -> None:
    state = cluster()
    state.set_serving(demand(1), 0)
    step(state, 0)
    with pytest.raises(ValueError, match="Release these first"):
        state.set_serving(demand(1, gpus=4.0), 1)
