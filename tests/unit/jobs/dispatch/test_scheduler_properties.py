"""Whatever clients, runs, nodes, Serve and dispatchers do: the scheduler's state and the store agree after each round."""

from __future__ import annotations

import contextlib
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduled_world import World, submission, with_tenants

from tandem.errors import IllegalTransitionError
from tandem.jobs.dispatch.requests import worker_of
from tandem.jobs.scheduling import ClusterState, Resources
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.records import Job
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore

CONFIG = with_tenants({"a": {"quota": {"gpus": 2}}, "b": {"limit": {"gpus": 3}, "weight": 2.0}})
NODES = {"n1": Resources(8.0, 4.0), "n2": Resources(4.0, 2.0)}
LIMITS = st.sampled_from([None, "1", "5", "01:00:00"])
SUBMISSIONS = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(["a", "b", ""]),
        "gpus": st.integers(1, 6),
        "fewest": st.integers(1, 6),
        "scheduling": st.fixed_dictionaries(
            {
                "priority": st.sampled_from(["low", "normal", "high", "no such class"]),
                "time_limit": LIMITS,
                "preemptible": st.booleans(),
            }
        ),
    }
)
OPERATIONS = st.one_of(
    st.tuples(st.just("submit"), SUBMISSIONS),
    st.tuples(st.sampled_from(["cancel", "pause", "resume", "hold", "release", "requeue"]), st.integers(0, 9)),
    st.tuples(st.sampled_from(["finish", "fail", "fail for good"]), st.integers(0, 9)),
    st.tuples(st.just("replicas"), st.integers(0, 4)),
    st.tuples(st.just("cordon"), st.sampled_from(["n1", "n2", None])),
    st.tuples(st.just("lose"), st.sampled_from(["n2", None])),
    st.tuples(st.just("leave"), st.none()),
    st.tuples(st.just("restart"), st.none()),
    st.tuples(st.just("round"), st.sampled_from([1.0, 40.0, 400.0])),
)


def perform(world: World, name: str, argument: Any, number: int) -> None:
    """One operation; those on jobs take one of the jobs by its number."""
    running = sorted(world.runner.running)
    jobs = sorted(job.id for job in world.store.page(limit=100).jobs)
    match name:
        case "submit":
            values = dict(argument)
            gpus = values.pop("gpus")
            values["fewest"] = min(values["fewest"], gpus)
            world.store.submit(submission(f"job-{number:03}", gpus, **values))
        case "replicas":
            world.wanted_replicas = argument
        case "cordon":
            world.cordoned = {argument} - {None}
        case "lose":
            world.nodes = {node: total for node, total in NODES.items() if node != argument}
        case "leave":
            world.runner.leave()
        case "restart":
            world.close()
            world.restart()
        case "round":
            world.clock.advance(argument)
        case "finish" | "fail" | "fail for good":
            if running:
                attempt = running[argument % len(running)]
                if name == "finish":
                    world.runner.finish(attempt)
                else:
                    world.runner.fail(attempt, "x", retryable=name == "fail")
        case _:
            if jobs:
                with contextlib.suppress(IllegalTransitionError):
                    getattr(world.store, name)(jobs[argument % len(jobs)])


def check_agreement(world: World) -> None:
    """The state holds the store's runs and queues, with the store's numbers, and its sums are those of its parts."""
    state = world.state
    jobs = {job.id: job for job in world.store.page(limit=100).jobs}
    active = {job.id: job for job in jobs.values() if job.state.active}
    waiting = {job.id for job in world.store.waiting()}
    queued = {job.id for queue in state.queues.values() for job in queue.jobs()}
    between_attempts = state.runs.keys() - active.keys()
    assert active.keys() <= state.runs.keys()
    assert all(jobs[job_id].state is State.QUEUED for job_id in between_attempts)
    refused = {job_id for job_id in waiting if "no such class" in str(jobs[job_id].reason)}
    assert queued == waiting - between_attempts - refused
    for job in active.values():
        check_run(state, job)
    fresh = ClusterState(state.policy, [account.tenant for account in state.accounts.values()], state.nodes.values())
    for run in state.runs.values():
        fresh.adopt(run, 0.0)
    for node in state.nodes:
        assert abs(state.free.free(node).gpus - fresh.free.free(node).gpus) < 1e-6
    for tenant, account in state.accounts.items():
        held = fresh.accounts[tenant].held
        assert abs(account.held.gpus - held.gpus) < 1e-6 and abs(account.held.cpus - held.cpus) < 1e-6
    assert len(state.ends) == len(state.runs)


def check_run(state: ClusterState, job: Job) -> None:
    run = state.runs[job.id]
    assert run.job.worker == worker_of(job)
    if job.state is State.PREEMPTING and run.shrinking_to != ():
        return  # it is being resized
    assert run.workers == job.workers
    assert run.is_stopping == job.state.leaving


@given(operations=st.lists(OPERATIONS, max_size=30))
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_state_and_store_agree_after_every_round(
    operations: list[tuple[str, Any]], sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("agreement") / "tandem.db"
    shutil.copy(sqlite_template, path)
    clock = ManualClock(datetime(2026, 5, 4, 12, tzinfo=UTC))
    with JobStore(f"sqlite:///{path}", clock=clock) as store:
        world = World(store, clock, nodes=dict(NODES), config=CONFIG)
        for number, (name, argument) in enumerate(operations):
            perform(world, name, argument, number)
            clock.advance(1.0)
            assert world.dispatcher.round()
            check_agreement(world)
        # Without further events everything that can run comes to its end.
        world.wanted_replicas, world.cordoned, world.nodes = 0, set(), dict(NODES)
        for job in store.page(limit=100).jobs:
            if job.state in (State.HELD, State.PAUSED) or "no such class" in str(job.reason):
                store.cancel(job.id)
        for _ in range(200):
            for attempt in list(world.runner.running):
                if attempt not in world.runner.leaving:
                    world.runner.finish(attempt)
            world.rounds(1, seconds=60.0)
            check_agreement(world)
            left = [job for job in store.page(limit=100).jobs if not job.state.ended]
            if all(job.tenant == "b" and job.resources.min_workers > 3 for job in left):
                break  # their tenant's limit is less than they need
        else:
            raise AssertionError([(job.id, job.state, job.reason) for job in left])
        assert not world.state.runs
        world.close()
