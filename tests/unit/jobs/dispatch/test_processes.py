"""Jobs as processes of this machine: each attempt is started once, and stopped as asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dispatch_world import DEADLINE_S, World, script

from tandem.db.schema import JobRow
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.runners.processes import ProcessRunner
from tandem.jobs.work.records import Job
from tandem.jobs.work.rows import job_values, to_job

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def claimed(text: str) -> Job:
    """A job that runs a shell script, in its first attempt."""
    return replace(to_job(JobRow(number=1, **job_values(script("a", text), NOON))), attempt=1)


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(runner: ProcessRunner, handle: str) -> RunStatus:
    """The status of an attempt after its end."""
    wait_until(lambda: (status := runner.state(handle)) is not None and status.state is not RunState.RUNNING)
    status = runner.state(handle)
    assert status is not None
    return status


def test_an_attempt_that_is_started_by_several_at_once_runs_once(world: World) -> None:
    job = claimed("sleep 0.5")
    runners = [world.runner() for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(runner.start, job) for runner in runners]
        assert {call.result() for call in calls} == {job.run_name}
    assert ended(runners[0], job.run_name) == RunStatus(state=RunState.FINISHED)
    # And not again after its end either: a dispatcher that stalled may ask late.
    late = runners[0].start(job)
    wait_until(lambda: runners[0].state(late) is not None and not runners[0]._parents)
    assert world.starts() == {job.run_name: 1}


def test_an_attempt_that_was_stopped_before_its_start_never_starts(world: World) -> None:
    job, runner = claimed("true"), world.runner()
    assert runner.find(job) is None
    runner.stop(job)
    assert runner.state(runner.start(job)) == RunStatus(state=RunState.STOPPED)
    wait_until(lambda: runner.state(job.run_name) is not None and not runner._parents)
    assert world.starts() == {}


def test_a_command_may_save_before_it_leaves_and_is_killed_if_it_does_not(world: World) -> None:
    saves = claimed(f"trap 'echo saved > {world.root}/checkpoint; exit 143' TERM; while :; do sleep 0.1; done")
    runner = world.runner()
    runner.start(saves)
    wait_until(lambda: world.starts().total() == 1)
    runner.stop(saves)
    assert ended(runner, saves.run_name) == RunStatus(state=RunState.STOPPED)
    assert (world.root / "checkpoint").read_text() == "saved\n"
    deaf = claimed("trap '' TERM; while :; do sleep 0.1; done")
    impatient = ProcessRunner(world.root / "runs", world.command, leave_s=0.2)
    impatient.start(deaf)
    impatient.stop(deaf)
    assert ended(impatient, deaf.run_name) == RunStatus(state=RunState.STOPPED)


def test_nothing_of_a_job_is_left_when_it_has_ended(world: World) -> None:
    job, runner = claimed(f"sleep 600 & echo $! > {world.root}/child; exit 0"), world.runner()
    assert ended(runner, runner.start(job)).state is RunState.FINISHED
    child = Path("/proc") / (world.root / "child").read_text().strip() / "stat"
    wait_until(lambda: not child.exists() or child.read_text().split()[2] == "Z")


def test_a_command_that_does_not_exist_has_failed(tmp_path: Path) -> None:
    runner = ProcessRunner(tmp_path, lambda job: ["/no/such/program"])
    job = claimed("")
    status = ended(runner, runner.start(job))
    assert status.state is RunState.FAILED and "No such file or directory" in str(status.error)
    assert runner.state("never-started.1") is None
