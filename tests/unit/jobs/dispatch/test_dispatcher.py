"""The dispatcher with real databases and real processes: starts, ends, adoption, and death at any point."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from dispatch_world import World, all_ended, rounds_until, script
from sqlalchemy.orm import Session

from tandem.errors import JobError, LeaseLostError
from tandem.jobs.dispatch.decisions import Capacity, Decision, Expire, Preempt, Resize, first_come_first_served
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.runners.processes import ProcessRunner
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import ItemSubmission, Job, Resources
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import ResizeRequested
from tandem.settings import child_environment

LONG = "exec sleep 600"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@contextlib.contextmanager
def dispatching(store: JobStore, runner: ProcessRunner) -> Iterator[Dispatcher]:
    dispatcher = Dispatcher(store, {"process": runner}, lambda: Capacity(cpus=2.0), lease_s=30.0)
    yield dispatcher
    dispatcher.close()


def test_jobs_run_and_end_as_their_commands_do(store: JobStore, world: World, clock: ManualClock) -> None:
    good = store.submit(script("good", """echo '{"loss": 1.5}' > "$1/result.json" """)).job
    bad = store.submit(script("bad", "echo no such file; exit 3", max_attempts=2)).job
    unknown = store.submit(script("unknown", "true", runner="nowhere")).job
    with dispatching(store, world.runner()) as dispatcher:
        rounds_until(dispatcher, lambda: store.get(bad.id).failures == 1)
        clock.advance(60.0)
        rounds_until(dispatcher, lambda: all_ended(store))
    done, dead = store.get(good.id), store.get(bad.id)
    assert (done.state, done.result, done.lease) == (State.FINISHED, {"loss": 1.5}, None)
    assert (dead.state, dead.error, dead.attempt) == (State.DEAD, "Exit status 3. no such file", 2)
    assert store.get(unknown.id).error == "There is no runner 'nowhere'; known: process."
    assert world.starts() == {f"{good.id}.1": 1, f"{bad.id}.1": 1, f"{bad.id}.2": 1}


def test_a_job_waits_for_room_and_says_so(store: JobStore, world: World) -> None:
    large = Resources(cpus_per_worker=2.0)
    first, second = (store.submit(script(name, LONG, resources=large)).job.id for name in ("first", "second"))
    with dispatching(store, world.runner()) as dispatcher:
        rounds_until(dispatcher, lambda: store.get(first).state is State.RUNNING)
        assert store.get(second).reason == "waits for 2 CPUs and 0 GPUs; 0 CPUs and 0 GPUs are free"
        store.cancel(first)
        rounds_until(dispatcher, lambda: store.get(second).state is State.RUNNING)
        assert store.get(first).state is State.CANCELLED
        store.pause(second)
        rounds_until(dispatcher, lambda: store.get(second).state is State.PAUSED)
        store.resume(second)
        rounds_until(dispatcher, lambda: store.get(second).state is State.RUNNING)
        assert store.get(second).run_name == f"{second}.2"
        store.cancel(second)
        rounds_until(dispatcher, lambda: all_ended(store))


def test_a_command_that_cannot_be_started_fails_its_attempt(store: JobStore, world: World) -> None:
    class Refusing(ProcessRunner):
        def start(self, job: Job) -> str:
            raise JobError("The disk is full.")

    job = store.submit(script("a", "true")).job
    with dispatching(store, Refusing(world.root, world.command)) as dispatcher:
        assert dispatcher.round()
        failed = store.get(job.id)
        assert (failed.state, failed.failures) == (State.QUEUED, 1)
        assert failed.error == "It could not be started: The disk is full."


def test_a_fault_in_one_runner_delays_no_other_job(store: JobStore, world: World) -> None:
    class Faulty(ProcessRunner):
        def find(self, job: Job) -> str | None:
            raise ValueError("a fault")

    broken = store.submit(script("broken", "true", runner="faulty", priority=-1)).job
    job = store.submit(script("a", "true")).job
    runners = {"process": world.runner(), "faulty": Faulty(world.root / "faulty", world.command)}
    dispatcher = Dispatcher(store, runners, lambda: Capacity(cpus=2.0))
    rounds_until(dispatcher, lambda: store.get(job.id).state is State.FINISHED)
    assert store.get(broken.id).state is State.STARTING
    dispatcher.close()


def test_a_fault_in_the_scheduler_ends_no_dispatcher(store: JobStore, world: World) -> None:
    faults = [KeyError("a field of a newer release"), ValueError("a wrong spec")]

    def decide(*state: Any) -> Iterable[Decision]:
        if faults:
            raise faults.pop()
        return first_come_first_served(*state)

    job = store.submit(script("a", "true")).job
    dispatcher = Dispatcher(store, {"process": world.runner()}, lambda: Capacity(cpus=2.0), decide=decide)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,), kwargs={"poll_s": 0.02})
    thread.start()
    deadline = time.monotonic() + 240.0
    while store.get(job.id).state is not State.FINISHED and time.monotonic() < deadline and thread.is_alive():
        time.sleep(0.02)
    stop.set()
    thread.join()
    assert store.get(job.id).state is State.FINISHED and not faults
    dispatcher.close()


def test_an_idle_dispatcher_starts_a_new_job_before_its_next_round_is_due(store: JobStore, world: World) -> None:
    stop = threading.Event()
    with dispatching(store, world.runner()) as dispatcher:
        assert dispatcher.round()
        thread = threading.Thread(target=dispatcher.run, args=(stop,), kwargs={"poll_s": 3600.0})
        thread.start()
        time.sleep(0.2)  # it waits
        job = store.submit(script("a", "true")).job
        deadline = time.monotonic() + 240.0
        while store.get(job.id).state is State.QUEUED:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stop.set()
        thread.join()


def test_processes_that_are_killed_are_noticed_and_the_job_is_tried_again(store: JobStore, world: World) -> None:
    job = store.submit(script("a", "kill -9 $PPID; kill -9 $$")).job
    with dispatching(store, world.runner()) as dispatcher:
        rounds_until(dispatcher, lambda: store.get(job.id).failures == 1)
    assert store.get(job.id).error == f"The processes of {job.id}.1 were killed."


def test_one_of_several_dispatchers_leads_and_the_next_adopts_what_runs(
    store: JobStore, world: World, clock: ManualClock
) -> None:
    job = store.submit(script("a", LONG)).job
    with dispatching(store, world.runner()) as first, dispatching(store, world.runner()) as second:
        rounds_until(first, lambda: store.get(job.id).state is State.RUNNING)
        assert second.round() is False
        clock.advance(30.0)
        assert second.round() is True
        adopted = store.get(job.id)
        assert (adopted.state, adopted.attempt) == (State.RUNNING, 1)
        assert adopted.lease is not None and adopted.lease.owner == second.owner
        assert first.round() is False, "the first one does not lead any more"
        second.resign()
        assert first.round() is True
        store.cancel(job.id)
        rounds_until(first, lambda: all_ended(store))
    assert world.starts() == {f"{job.id}.1": 1}


def test_a_dispatcher_that_stalls_while_it_starts_jobs_claims_none(
    store: JobStore, world: World, clock: ManualClock
) -> None:
    with dispatching(store, world.runner()) as other:

        def stalls(*_: object) -> Capacity:
            clock.advance(60.0)
            assert other.round()
            return Capacity(cpus=2.0)

        late = Dispatcher(store, {"process": world.runner()}, stalls, lease_s=30.0)
        job = store.submit(script("a", LONG)).job
        with pytest.raises(LeaseLostError, match=r"led as dispatcher in term 1; now .* \(term 2\) does"):
            late.round()
        late.close()
        store.cancel(job.id)
        rounds_until(other, lambda: all_ended(store))
    assert world.starts() == {f"{job.id}.1": 1}


@pytest.mark.parametrize("decision", [Preempt, partial(Resize, workers=1), Expire])
def test_a_dispatcher_that_stalls_while_it_decides_stops_no_run_of_the_next_leader(
    store: JobStore, world: World, clock: ManualClock, decision: Callable[..., Decision]
) -> None:
    job = store.submit(script("a", LONG)).job
    with dispatching(store, world.runner()) as other:

        def stalls(*_: object) -> list[Decision]:
            clock.advance(60.0)
            assert other.round()
            return [decision(job_id=job.id, reason="seen long ago")]

        late = Dispatcher(store, {"process": world.runner()}, lambda: Capacity(cpus=2.0), lease_s=30.0)
        rounds_until(late, lambda: store.get(job.id).state is State.RUNNING)
        late._decide = stalls
        with pytest.raises(LeaseLostError, match=r"led as dispatcher in term 1; now .* \(term 2\) does"):
            late.round()
        late.close()
        assert store.get(job.id).state is State.RUNNING
        assert not any(isinstance(each.event, ResizeRequested) for each in store.events(job.id))
        store.cancel(job.id)
        rounds_until(other, lambda: all_ended(store))


def test_a_start_that_comes_after_the_cancel_of_its_job_starts_nothing(
    store: JobStore, world: World, clock: ManualClock
) -> None:
    job = store.submit(script("a", LONG)).job
    claimed = store.claim(job.id, "a dispatcher that stalls before it starts the job", 30.0)
    assert claimed is not None
    store.cancel(job.id)
    runner = world.runner()
    with dispatching(store, runner) as dispatcher:
        assert dispatcher.round()
    assert store.get(job.id).state is State.CANCELLED
    assert runner.state(world.runner().start(claimed)) == RunStatus(state=RunState.STOPPED)
    assert world.starts() == {}


def test_queue_items_of_a_worker_that_is_gone_are_queued_again(
    store: JobStore, queue: ItemQueue, world: World, clock: ManualClock
) -> None:
    item = queue.submit(ItemSubmission(queue="base@1", payload={}))
    late = queue.submit(ItemSubmission(queue="base@1", payload={}, deadline=clock.now() + timedelta(seconds=30)))
    queue.claim("base@1", "a worker that is killed", 30.0)
    clock.advance(30.0)
    with dispatching(store, world.runner()) as dispatcher:
        assert dispatcher.round()
    assert (queue.get(item.id).state, queue.get(item.id).failures) == (State.QUEUED, 1)
    assert queue.get(late.id).state is State.EXPIRED


# ---- death at any point ----


class KilledError(BaseException):
    """The end of a dispatcher, as SIGKILL ends it: nothing of its own runs afterwards."""


class Death:
    """Ends a dispatcher at its n-th write to the database or to a runner."""

    def __init__(self, at: int) -> None:
        self._left = at

    @property
    def has_come(self) -> bool:
        return self._left <= 0

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise KilledError


class DyingStore(JobStore):
    """Ends before and after each of its transactions."""

    death: Death

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[tuple[Session, datetime]]:
        self.death.step()
        with super()._transaction() as transaction:
            yield transaction
        self.death.step()


class DyingRunner(ProcessRunner):
    """Ends before and after each start and stop."""

    death: Death

    def start(self, job: Job) -> str:
        self.death.step()
        handle = super().start(job)
        self.death.step()
        return handle

    def stop(self, job: Job) -> None:
        self.death.step()
        super().stop(job)
        self.death.step()


def survives(store: JobStore, root: Path, clock: ManualClock, death: Death) -> bool:
    """Run two jobs with a dispatcher that dies, then with another one; whether the first lived to the end."""
    world = World(root)
    root.mkdir()
    short = store.submit(script("short", "true")).job.id
    long = store.submit(script("long", LONG)).job.id
    with DyingStore(store.url, clock=clock) as dying_store:
        dying_store.death = death
        runner = DyingRunner(root / "runs", world.command, leave_s=20.0)
        runner.death = death
        with contextlib.suppress(KilledError), dispatching(dying_store, runner) as dispatcher:
            rounds_until(dispatcher, lambda: store.get(long).state is State.RUNNING)
            store.cancel(long)
            rounds_until(dispatcher, lambda: all_ended(store))
        survived = not death.has_come
    clock.advance(30.0)
    with dispatching(store, world.runner()) as dispatcher:
        rounds_until(dispatcher, lambda: store.get(long).state is not State.QUEUED)
        store.cancel(long)
        rounds_until(dispatcher, lambda: all_ended(store))
        dispatcher.resign()
    assert (store.get(short).state, store.get(short).attempt) == (State.FINISHED, 1)
    assert (store.get(long).state, store.get(long).attempt) == (State.CANCELLED, 1)
    starts = world.starts()
    assert starts[f"{short}.1"] == 1 and starts[f"{long}.1"] <= 1 and starts.total() <= 2
    return survived


def test_a_dispatcher_that_dies_between_any_two_writes_loses_and_doubles_nothing(
    store: JobStore, tmp_path: Path, clock: ManualClock
) -> None:
    writes = 1
    while not survives(store, tmp_path / f"death-at-write-{writes}", clock, Death(writes)):
        writes += 1
    assert writes > 15


DISPATCHER = """
import sys, threading
from pathlib import Path
from dispatch_world import World
from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.work.store import JobStore
runner = World(Path(sys.argv[2])).runner()
dispatcher = Dispatcher(JobStore(sys.argv[1]), {"process": runner}, lambda: Capacity(cpus=4.0), lease_s=0.5)
print("ready", flush=True)
dispatcher.run(threading.Event(), poll_s=0.01)
"""


def test_dispatchers_that_are_killed_at_random_start_each_job_once(url: str, world: World) -> None:
    seed = int(os.environ.get("TANDEM_TEST_SEED") or 1)
    draw = random.Random(seed)
    command = [sys.executable, "-c", DISPATCHER, url, str(world.root)]
    environment = child_environment({"PYTHONPATH": ":".join(sys.path)})
    with JobStore(url) as store:
        jobs = [store.submit(script(f"job-{n}", f"sleep 0.{n % 4}")).job.id for n in range(16)]
        deadline = time.monotonic() + 240.0
        while not all_ended(store):
            assert time.monotonic() < deadline, f"seed {seed}: {[store.get(job).state for job in jobs]}"
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0.3, 2.0))
            process.kill()
            process.wait()
            process.stdout.close()
        assert {store.get(job).state for job in jobs} == {State.FINISHED}, f"seed {seed}"
    assert world.starts() == {f"{job}.1": 1 for job in jobs}, f"seed {seed}"
