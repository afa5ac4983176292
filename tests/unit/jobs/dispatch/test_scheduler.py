"""The scheduler in the dispatcher, with real databases and a simulated cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
from scheduled_world import World, submission, with_tenants

from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.history import read_history
from tandem.jobs.scheduling import Resources
from tandem.jobs.work import records
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore


@pytest.fixture
def world(store: JobStore, clock: ManualClock) -> Iterator[World]:
    world = World(store, clock)
    yield world
    world.close()


def test_an_urgent_job_starts_first_and_the_others_are_told_why_they_wait(world: World) -> None:
    for name, priority in (("first", "normal"), ("second", "normal"), ("urgent", "high")):
        world.store.submit(submission(name, 4, scheduling={"priority": priority}))
    world.rounds(2)
    assert world.workers("urgent") == 4
    assert str(world.job("first").reason).startswith("waits for 4 GPUs; 0 are free for it, enough by 2026-05-05")
    assert str(world.job("second").reason).startswith("waits behind 1 job, of which first is the first")
    world.runner.finish("urgent.1")
    world.rounds(2)
    assert world.job("urgent").state is State.FINISHED and world.workers("first") == 4


def test_reasons_are_written_again_only_when_something_happens(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.config = with_tenants({"a": {"quota": {"gpus": 6, "cpus": 8}}})
    world.restart()
    world.store.submit(submission("running", 2, tenant="a", scheduling={"time_limit": "1:00:00", "priority": "high"}))
    world.rounds(2)
    long, high = {"time_limit": "4:00:00"}, {"time_limit": "4:00:00", "priority": "high"}
    for name, gpus, tenant, scheduling in (("large", 4, "a", high), ("behind", 4, "a", high), ("long", 2, "b", long)):
        world.store.submit(submission(name, gpus, tenant=tenant, scheduling=scheduling))
    world.rounds(2)
    said = [world.job(name).reason for name in ("large", "behind", "long")]
    assert "a job of another tenant gets them" in str(said[2])
    written: list[Mapping[str, str]] = []
    monkeypatch.setattr(world.store, "explain", written.append)
    world.rounds(100)
    assert written == []


def test_a_tenant_never_exceeds_its_limit(world: World) -> None:
    world.config = with_tenants({"interns": {"limit": {"gpus": 2}}})
    world.restart()
    for number in range(3):
        world.store.submit(submission(f"intern-{number}", tenant="interns"))
    world.rounds(2)
    assert [world.workers(f"intern-{number}") for number in range(3)] == [1, 1, None]
    assert "its limit is 2 GPUs" in str(world.job("intern-2").reason)


def test_a_job_within_its_quota_stops_one_that_borrows_which_goes_on_later(world: World) -> None:
    world.config = with_tenants({"a": {"quota": {"gpus": 2}}, "b": {"quota": {"gpus": 2}}})
    world.restart()
    for number in range(4):
        world.store.submit(submission(f"b{number}", tenant="b"))
    world.rounds(2)
    world.store.submit(submission("a0", 2, tenant="a"))
    world.rounds(40, seconds=10.0)  # longer than 5 minutes
    assert world.workers("a0") == 2
    preempted = [job for job in (world.job(f"b{number}") for number in range(4)) if job.state is State.QUEUED]
    assert len(preempted) == 2 and all(job.attempt == 1 for job in preempted)
    assert [read_history(world.store, job.id).preemptions for job in preempted] == [1, 1]
    world.runner.finish("a0.1")
    world.rounds(2)
    assert [world.workers(job.id) for job in preempted] == [1, 1]


def test_a_replica_without_room_takes_a_worker_of_an_elastic_run_which_gets_it_back(world: World) -> None:
    world.store.submit(submission("elastic", 4, fewest=1))
    world.rounds(70)
    assert world.workers("elastic") == 4
    world.wanted_replicas = 1
    world.rounds(5)
    assert world.workers("elastic") == 3 and world.places["replica-0"] == ["n1"]
    assert world.job("elastic").attempt == 2
    history = read_history(world.store, "elastic")
    assert (history.preemptions, history.resize_to) == (0, None)
    assert 65.0 < history.ran_s < 80.0
    world.wanted_replicas = 0
    world.rounds(70)
    assert world.workers("elastic") == 4
    assert world.places == {"elastic.3": ["n1"] * 4}


def test_replicas_stop_training_that_cannot_shrink_and_keep_its_room_until_they_are_placed(world: World) -> None:
    world.store.submit(submission("rigid", 4))
    world.rounds(70)
    world.store.submit(submission("small"))
    world.wanted_replicas = 2
    world.rounds(1)
    assert world.job("rigid").state is State.PREEMPTING
    assert "m of app needs 2 more replicas" in str(world.job("rigid").reason)
    world.rounds(4)
    assert world.pending_replicas == 0 and world.workers("rigid") is None
    assert world.workers("small") == 1
    world.wanted_replicas = 0
    world.runner.finish("small.1")
    world.rounds(3)
    assert world.workers("rigid") == 4


def test_a_job_at_its_time_limit_expires_over_all_its_attempts(world: World) -> None:
    world.store.submit(submission("limited", 4, scheduling={"time_limit": "2"}))
    world.rounds(62)
    world.wanted_replicas = 4
    world.rounds(5)
    assert world.job("limited").state is State.QUEUED
    world.wanted_replicas = 0
    world.rounds(30)
    assert world.job("limited").state is State.RUNNING
    world.rounds(40)
    assert world.job("limited").state is State.EXPIRED
    events = [numbered.event for numbered in world.store.events("limited")]
    assert any("reached its time limit of 0:02:00" in str(getattr(event, "reason", "")) for event in events)


def test_a_job_that_is_impossible_here_waits_with_the_reason(world: World) -> None:
    world.store.submit(submission("misspelt", scheduling={"priority": "urgnet"}))
    world.store.submit(submission("huge", 64))
    world.store.submit(submission("fine"))
    world.rounds(2)
    assert "urgnet" in str(world.job("misspelt").reason)
    assert "needs 64 GPUs" in str(world.job("huge").reason)
    assert world.workers("fine") == 1


def test_jobs_that_need_nothing_here_start_at_once(world: World) -> None:
    world.store.submit(submission("full", 4))
    nothing = records.Resources(cpus_per_worker=0.0)
    world.store.submit(submission("batch", kind=JobKind.BATCH, resources=nothing))
    world.rounds(2)
    assert world.workers("full") == 4 and world.job("batch").state is State.RUNNING
    assert set(world.state.runs) == {"full"}


def test_a_new_dispatcher_takes_over_runs_with_their_times_and_starts_no_more_than_fits(world: World) -> None:
    world.store.submit(submission("limited", 2, scheduling={"time_limit": "3"}))
    world.store.submit(submission("other", 1))
    world.rounds(60)
    world.store.submit(submission("large", 2))
    world.restart()
    world.rounds(1)
    run = world.state.runs["limited"]
    assert (run.workers, dict(run.placement)) == (2, {"n1": 2})
    assert world.clock.now().timestamp() - run.started_s == pytest.approx(91.0, abs=2.0)
    assert world.workers("large") is None
    world.rounds(95)
    assert world.job("limited").state is State.EXPIRED and world.workers("large") == 2


def test_a_resize_whose_dispatcher_dies_goes_on_as_a_job_that_waits(world: World) -> None:
    world.store.submit(submission("elastic", 4, fewest=1))
    world.rounds(70)
    world.wanted_replicas = 1
    world.rounds(1)
    assert world.job("elastic").state is State.PREEMPTING
    assert read_history(world.store, "elastic").resize_to == 3
    world.restart()
    world.rounds(4)
    assert world.workers("elastic") == 3 and world.pending_replicas == 0


def test_nothing_new_is_placed_on_a_cordoned_node_and_what_runs_there_stays(world: World) -> None:
    world.nodes["n2"] = Resources(8.0, 4.0)
    world.store.submit(submission("a", 4))
    world.rounds(2)
    (node,) = dict(world.state.runs["a"].placement)
    world.cordoned.add(node)
    world.store.submit(submission("b", 4))
    world.store.submit(submission("c", 1))
    world.rounds(2)
    assert (world.workers("a"), world.workers("b"), world.workers("c")) == (4, 4, None)


def test_a_request_of_a_client_ends_a_resize(world: World) -> None:
    world.store.submit(submission("elastic", 4, fewest=1))
    world.rounds(70)
    world.wanted_replicas = 1
    world.rounds(1)
    world.store.pause("elastic")
    world.rounds(2)
    assert world.job("elastic").state is State.PAUSED and not world.state.runs
    world.store.resume("elastic")
    world.rounds(3)
    assert world.workers("elastic") == 3


def test_the_room_of_a_run_is_kept_while_it_is_resized(world: World) -> None:
    world.store.submit(submission("elastic", 4, fewest=1))
    world.rounds(70)
    world.wanted_replicas = 1
    world.rounds(1)
    world.store.submit(submission("urgent", 3, scheduling={"priority": "high"}))
    world.rounds(4)
    assert (world.workers("elastic"), world.workers("urgent")) == (3, None)


def test_the_cluster_is_asked_only_while_jobs_wait_or_run_that_need_some_of_it(world: World) -> None:
    asked = 0
    ask = world.capacity

    def counted() -> Capacity:
        nonlocal asked
        asked += 1
        return ask()

    world.capacity = counted  # type: ignore[method-assign]
    world.restart()
    world.rounds(3)
    assert asked == 0
    needs_nothing = records.Resources(cpus_per_worker=0.0)
    world.store.submit(replace(submission("batch"), kind=JobKind.BATCH, resources=needs_nothing))
    world.rounds(3)
    assert (asked, world.workers("batch")) == (0, 1)
    world.wanted_replicas = 1
    world.store.submit(submission("train", 4))
    world.rounds(2)
    assert (asked, world.workers("train")) == (2, None), "serving comes first, also where nothing was asked before"
    world.wanted_replicas = 0
    world.rounds(1)
    assert world.workers("train") == 4
    world.runner.finish("train.1")
    world.rounds(1)
    before = asked
    world.rounds(3)
    assert asked == before and not world.state.runs
