"""Jobs that commands submit, in the store: imported once, followed, and followed again. On SQLite and PostgreSQL."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.config import DataConfig, TrainConfig, from_dict, to_dict
from tandem.errors import LeaseLostError
from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.fine_tuning.folder import SPEC
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.folder_import import SILENT_S, FolderImport
from tandem.jobs.folder_jobs import folder_submission
from tandem.jobs.runners.memory import MemoryRunner
from tandem.jobs.sweep import SweepFolder, SweepPlan
from tandem.jobs.tracking.logs import log_path
from tandem.jobs.work.clock import ManualClock
from tandem.jobs.work.leader import Leadership, Term
from tandem.jobs.work.records import Job, Resources
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import StateChanged

STARTED = {"event": "started", "time": 1_700_000_000.0, "workers": 2}
STEP = {"event": "step", "time": 1_700_000_010.0, "step": 7, "steps": 30, "loss": 2.5}
DONE = {"event": "finished", "time": 1_700_000_020.0, "model": "x@1", "loss": 1.0}
FAILED = {"event": "failed", "time": 1_700_000_020.0, "error": "disk full"}


class CommandLine(MemoryRunner):
    """Commands, and the cluster that they submit to, in memory: its attempts are also what a dispatcher's runner finds."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.home = home
        self.submitted: dict[str, JobState] = {}
        self.lists = 0

    def submit(self, name: str) -> str:
        """Submit a prepared job, as `tandem train submit` does."""
        job = JobFolder(self.home / "jobs" / name)
        submission = f"{name}.{job.last_attempt() + 1}"
        self.submitted[submission] = JobState.RUNNING
        job.add_submission(submission, "http://x")
        return submission

    # ---- `folder_import.Submissions` ----

    def states(self) -> dict[str, JobState]:
        self.lists += 1
        return dict(self.submitted)

    def log_lines(self, submission: str) -> Iterable[str]:
        return [f"log of {submission}"]

    # ---- `dispatch.runner.Runner` ----

    def find(self, job: Job) -> str | None:
        return job.run_name if job.run_name in self.submitted else super().find(job)

    def state(self, handle: str) -> RunStatus | None:
        match self.submitted.get(handle):
            case JobState.RUNNING:
                return RunStatus(state=RunState.RUNNING)
            case JobState.STOPPED:
                return RunStatus(state=RunState.STOPPED)
            case JobState.FINISHED:
                return RunStatus(state=RunState.FINISHED, result={"model": "x@1"})
            case _:
                return super().state(handle)

    def stop(self, job: Job) -> None:
        if job.run_name in self.submitted:
            self.submitted[job.run_name] = JobState.STOPPED
        else:
            super().stop(job)


def make_job(home: Path, name: str, *events: dict[str, Any], submissions: int = 1, **config: Any) -> JobFolder:
    """A job's folder as commands leave it; its files are old."""
    folder = home / "jobs" / name
    folder.mkdir(parents=True)
    values = to_dict(TrainConfig(name="x", data=DataConfig(path="d"), steps=30))
    made = from_dict(TrainConfig, {**values, "parallel": {"workers": 2}, **config})
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(made)))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    job = JobFolder(folder)
    for number in range(submissions):
        job.add_submission(f"{name}.{number + 1}", "http://x")
    age(folder, 2 * SILENT_S)
    return job


def age(folder: Path, seconds: float) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def make_sweep(home: Path, name: str, *trials: str) -> SweepFolder:
    sweep = SweepFolder(home / "sweeps" / name)
    sweep.path.mkdir(parents=True)
    plan = SweepPlan(name="x", metric="loss", parallel=1, register=True, compared=(), trials=({},), jobs=trials)
    (sweep.path / "sweep.json").write_text(json.dumps(asdict(plan)))
    sweep.add_submission(f"{name}.1", "http://x")
    return sweep


@pytest.fixture
def commands(tandem_home: Path) -> CommandLine:
    return CommandLine(tandem_home)


@pytest.fixture
def importer(store: JobStore, commands: CommandLine) -> FolderImport:
    return FolderImport(store, lambda: commands)


@pytest.fixture
def dispatcher(store: JobStore, commands: CommandLine, importer: FolderImport) -> Iterator[Dispatcher]:
    importer.every_s = 0.0
    made = Dispatcher(store, {"ray": commands}, lambda: Capacity(cpus=8.0), chores=(importer,))
    yield made
    made.close()


def rounds(dispatcher: Dispatcher, count: int = 3) -> None:
    for _ in range(count):
        assert dispatcher.round()


# ---- import ----


def test_each_job_is_recorded_once_with_its_state_result_and_tenant(
    store: JobStore, importer: FolderImport, tandem_home: Path
) -> None:
    make_job(tandem_home, "stopped-1", STARTED, STEP, submissions=3)
    make_job(tandem_home, "failed-1", STARTED, FAILED)
    make_job(tandem_home, "finished-1", STARTED, STEP, DONE, tenant="lab").export.mkdir()
    sweep = make_sweep(tandem_home, "x-sweep-1", "deleted-1", "finished-1")
    (sweep.path / "events.jsonl").write_text(json.dumps({"event": "swept", "best": 1, "job": "finished-1"}) + "\n")
    assert importer.run(None) is False
    jobs = {job.id: job for job in store.page(limit=100).jobs}
    assert {job.id: (job.state, job.tenant) for job in jobs.values()} == {
        "stopped-1": (State.PAUSED, ""),
        "failed-1": (State.FAILED, ""),
        "finished-1": (State.FINISHED, "lab"),
        "x-sweep-1": (State.FINISHED, "lab"),
    }
    finished, stopped = jobs["finished-1"], jobs["stopped-1"]
    assert finished.result is not None and finished.result["model"] == "x@1"
    assert finished.started_at is not None and finished.started_at.timestamp() == STARTED["time"]
    assert finished.ended_at is not None and finished.ended_at.timestamp() == DONE["time"]
    assert jobs["failed-1"].error == "disk full" and jobs["x-sweep-1"].kind is JobKind.SWEEP
    assert (stopped.attempt, stopped.handle, stopped.ended_at) == (3, "stopped-1.3", None)
    assert stopped.resources == Resources(min_workers=2, max_workers=2)
    (recorded,) = [each.event for each in store.events("finished-1")]
    assert isinstance(recorded, StateChanged) and recorded.action == "import"

    # Neither the next look of this process, nor the first one of the next leader, changes anything.
    for again in (importer, FolderImport(store, lambda: CommandLine(tandem_home))):
        again.run(None)
        assert {job.id: job for job in store.page(limit=100).jobs} == jobs


def test_a_folder_without_a_submission_or_with_broken_files_is_taken_when_it_is_whole(
    store: JobStore, importer: FolderImport, commands: CommandLine, tandem_home: Path
) -> None:
    prepared, broken = (make_job(tandem_home, name, submissions=n) for name, n in (("prepared-1", 0), ("broken-1", 1)))
    whole = (broken.path / "config.yaml").read_text()
    (broken.path / "config.yaml").write_text(whole[: len(whole) // 2])
    copied = make_job(tandem_home, "copied-1", STARTED)
    (copied.path / "config.yaml").rename(tandem_home / "later.yaml")
    make_job(tandem_home, "good-1", STARTED)
    importer.run(None)
    assert [job.id for job in store.page().jobs] == ["good-1"]
    (broken.path / "config.yaml").write_text(whole)
    (tandem_home / "later.yaml").rename(copied.path / "config.yaml")
    commands.submit(prepared.id)
    importer.run(None)
    assert {job.id: job.state for job in store.page().jobs} == {
        "good-1": State.PAUSED,
        "broken-1": State.PAUSED,
        "copied-1": State.PAUSED,
        "prepared-1": State.RUNNING,
    }


def test_known_folders_are_listed_and_not_read(
    store: JobStore, importer: FolderImport, commands: CommandLine, tandem_home: Path
) -> None:
    made = [make_job(tandem_home, f"job-{n}", STARTED, FAILED) for n in range(60)]
    assert [importer.run(None) for _ in range(2)] == [True, False], "a part of them in each look"
    assert len(store.page(limit=1000).jobs) == 60
    lists = commands.lists
    for job in made:
        (job.path / "config.yaml").write_text("unreadable")
        (job.path / "events.jsonl").unlink()
    importer.run(None)
    assert commands.lists == lists and {job.state for job in store.page(limit=1000).jobs} == {State.FAILED}


def test_a_job_of_the_store_is_not_imported_a_second_time(
    store: JobStore, importer: FolderImport, tandem_home: Path
) -> None:
    folder = make_job(tandem_home, "own-1", STARTED)
    submitted = store.submit(folder_submission(folder)).job
    fine_tuning = make_job(tandem_home, "ftjob-1", STARTED, FAILED)
    (fine_tuning.path / SPEC).write_text("{}")
    importer.run(None)
    (job,) = store.page().jobs
    assert (job.number, job.state) == (submitted.number, State.QUEUED)
    claimed = store.claim(job.id, "a", 30.0)
    assert claimed is not None and claimed.run_name == "own-1.2", "the name of the attempt before is taken"


def test_folders_of_jobs_that_were_deleted_after_their_time_are_not_imported_again(
    store: JobStore, commands: CommandLine, tandem_home: Path
) -> None:
    for name, days in (("old-1", 31), ("recent-1", 29), ("running-1", 31)):
        age(make_job(tandem_home, name, STARTED).path, days * 86400.0)
    commands.submitted["running-1.1"] = JobState.RUNNING
    FolderImport(store, lambda: commands, keep_s=30 * 86400.0).run(None)
    assert {job.id for job in store.page().jobs} == {"recent-1", "running-1"}


def test_a_run_of_another_cluster_is_recorded_at_its_end_or_when_it_has_long_been_silent(
    store: JobStore, importer: FolderImport, tandem_home: Path
) -> None:
    job = make_job(tandem_home, "elsewhere-1", STARTED, STEP)
    age(job.path, 60.0)
    importer.run(None)
    assert store.page().jobs == [], "it may be running"
    age(job.path, 2 * SILENT_S)
    importer.run(None)
    assert store.get(job.id).state is State.PAUSED
    # It was running after all.
    with (job.path / "events.jsonl").open("a") as journal:
        journal.write(json.dumps(FAILED) + "\n")
    importer.run(None)
    failed = store.get(job.id)
    assert (failed.state, failed.error, failed.attempt) == (State.FAILED, "disk full", 1)


def test_a_leader_whose_term_has_ended_imports_nothing(
    store: JobStore, leadership: Leadership, clock: ManualClock, importer: FolderImport, tandem_home: Path
) -> None:
    make_job(tandem_home, "a-1", STARTED, FAILED)
    old = leadership.acquire("dispatcher", "a", 30.0)
    clock.advance(31.0)
    assert isinstance(old, Term) and leadership.acquire("dispatcher", "b", 30.0) is not None
    with pytest.raises(LeaseLostError):
        importer.run(old)
    assert store.page().jobs == []


# ---- following ----


def test_a_job_submitted_by_command_is_followed_to_its_end(
    store: JobStore, dispatcher: Dispatcher, commands: CommandLine, tandem_home: Path
) -> None:
    make_job(tandem_home, "a-1", submissions=0)
    rounds(dispatcher)
    submission = commands.submit("a-1")
    rounds(dispatcher)
    job = store.get("a-1")
    assert (job.state, job.handle, job.run_name) == (State.RUNNING, submission, submission)
    assert job.lease is not None and job.lease.owner == dispatcher.owner
    commands.submitted[submission] = JobState.FINISHED
    rounds(dispatcher)
    done = store.get("a-1")
    assert (done.state, done.result, done.attempt) == (State.FINISHED, {"model": "x@1"}, 1)


def test_a_job_submitted_by_command_is_cancelled_like_any(
    store: JobStore, dispatcher: Dispatcher, commands: CommandLine, tandem_home: Path
) -> None:
    make_job(tandem_home, "a-1", submissions=0)
    submission = commands.submit("a-1")
    rounds(dispatcher)
    store.cancel("a-1")
    rounds(dispatcher)
    assert (store.get("a-1").state, commands.submitted[submission]) == (State.CANCELLED, JobState.STOPPED)


@pytest.mark.parametrize("end", [State.PAUSED, State.CANCELLED, State.EXPIRED, State.FAILED, State.QUEUED])
def test_a_job_that_its_command_starts_again_is_followed_again(
    end: State, store: JobStore, dispatcher: Dispatcher, commands: CommandLine, tandem_home: Path
) -> None:
    make_job(tandem_home, "a-1", *([STARTED, FAILED] if end is State.FAILED else []), submissions=0)
    commands.submitted["a-1.1"] = JobState.FAILED
    JobFolder(tandem_home / "jobs" / "a-1").add_submission("a-1.1", "http://x")
    if end is not State.FAILED:
        commands.submitted["a-1.1"] = JobState.RUNNING
    rounds(dispatcher)
    match end:
        case State.PAUSED:
            commands.submitted["a-1.1"] = JobState.STOPPED  # `tandem train stop`
        case State.CANCELLED:
            store.cancel("a-1")
        case State.EXPIRED:
            store.expire("a-1")
        case State.QUEUED:
            commands.submitted["a-1.1"] = JobState.STOPPED
            rounds(dispatcher)
            store.hold(store.resume("a-1").id)
    rounds(dispatcher)
    assert store.get("a-1").state is (State.HELD if end is State.QUEUED else end)
    # Now with other workers: they are no part of the job's identity.
    config = tandem_home / "jobs" / "a-1" / "config.yaml"
    config.write_text(config.read_text().replace("workers: 2", "workers: 4"))
    assert commands.submit("a-1") == "a-1.2"
    rounds(dispatcher)
    job = store.get("a-1")
    assert (job.state, job.handle, job.attempt, job.workers) == (State.RUNNING, "a-1.2", 2, 4)
    assert (job.error, job.result, job.ended_at, job.failures) == (None, None, None, 0)
    commands.submitted["a-1.2"] = JobState.FINISHED
    rounds(dispatcher)
    assert store.get("a-1").state is State.FINISHED


def test_an_attempt_that_began_and_ended_between_two_looks_is_recorded_with_its_log(
    store: JobStore, importer: FolderImport, commands: CommandLine, tandem_home: Path
) -> None:
    job = make_job(tandem_home, "a-1", STARTED, FAILED)
    importer.run(None)
    with (job.path / "events.jsonl").open("a") as journal:
        journal.write("".join(json.dumps(event) + "\n" for event in (STARTED, DONE)))
    job.export.mkdir()
    commands.submitted[commands.submit(job.id)] = JobState.FINISHED
    importer.run(None)
    done = store.get(job.id)
    assert (done.state, done.attempt, done.error) == (State.FINISHED, 2, None)
    assert done.result is not None and done.result["model"] == "x@1"
    assert log_path(job.path, 2).read_text() == "log of a-1.2\n"


def test_a_newer_submission_is_followed_once_the_attempt_before_has_ended(
    store: JobStore, dispatcher: Dispatcher, commands: CommandLine, tandem_home: Path
) -> None:
    make_job(tandem_home, "a-1", submissions=0)
    commands.submit("a-1")
    rounds(dispatcher)
    # Its driver was lost, and the command that follows it submits it again, before the dispatcher has noticed.
    commands.submit("a-1")
    rounds(dispatcher)
    assert store.get("a-1").handle == "a-1.1"
    commands.submitted["a-1.1"] = JobState.STOPPED
    rounds(dispatcher)
    job = store.get("a-1")
    assert (job.state, job.handle, job.attempt) == (State.RUNNING, "a-1.2", 2)


def test_the_same_content_submitted_to_the_store_continues_an_imported_job(
    store: JobStore, importer: FolderImport, tandem_home: Path
) -> None:
    stopped = make_job(tandem_home, "stopped-1", STARTED, STEP, submissions=3)
    finished = make_job(tandem_home, "finished-1", STARTED, DONE)
    finished.export.mkdir()
    importer.run(None)
    submitted = store.submit(folder_submission(stopped))
    assert (submitted.is_new, submitted.job.state) == (False, State.QUEUED)
    claimed = store.claim("stopped-1", "a", 30.0)
    assert claimed is not None and claimed.run_name == "stopped-1.4"
    again = store.submit(folder_submission(finished))
    assert (again.is_new, again.job.state) == (False, State.FINISHED)
