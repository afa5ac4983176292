"""Import of folder jobs into the database: each once, as it is. On SQLite and PostgreSQL."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.config import DataConfig, TrainConfig, from_dict, to_dict
from tandem.jobs.folder import JobFolder, JobState
from tandem.jobs.folder_jobs import folder_submission, import_folders
from tandem.jobs.sweep import SweepFolder, SweepPlan
from tandem.jobs.work.records import Resources
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import StateChanged, Step

STARTED = {"event": "started", "time": 1_700_000_000.0, "workers": 2}
STEP = {"event": "step", "time": 1_700_000_010.0, "step": 7, "steps": 30, "loss": 2.5}
DONE = {"event": "finished", "time": 1_700_000_020.0, "model": "x@1", "loss": 1.0}
FAILED = {"event": "failed", "time": 1_700_000_020.0, "error": "disk full"}


def make_job(home: Path, name: str, *events: dict[str, Any], submissions: int = 1) -> JobFolder:
    folder = home / "jobs" / name
    folder.mkdir(parents=True)
    values = to_dict(TrainConfig(name="x", data=DataConfig(path="d"), steps=30))
    config = from_dict(TrainConfig, {**values, "parallel": {"workers": 2}})
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    job = JobFolder(folder)
    for number in range(submissions):
        job.add_submission(f"{name}.{number + 1}", "http://x")
    return job


@pytest.fixture
def folders(tandem_home: Path) -> Path:
    """A job in each state, a sweep that has ended, and a folder that cannot be read."""
    make_job(tandem_home, "new-1", submissions=0)
    make_job(tandem_home, "stopped-1", STARTED, STEP, submissions=3)
    make_job(tandem_home, "failed-1", STARTED, FAILED)
    make_job(tandem_home, "finished-1", STARTED, STEP, DONE).export.mkdir()
    sweep = SweepFolder(tandem_home / "sweeps" / "x-sweep-1")
    sweep.path.mkdir(parents=True)
    plan = SweepPlan(
        name="x", metric="loss", parallel=1, register=True, compared=(), trials=({},), jobs=("finished-1",)
    )
    (sweep.path / "sweep.json").write_text(json.dumps(asdict(plan)))
    (sweep.path / "events.jsonl").write_text(json.dumps({"event": "swept", "best": 1, "job": "finished-1"}) + "\n")
    bad = tandem_home / "jobs" / "bad-1"
    bad.mkdir()
    (bad / "config.yaml").write_text("no: such key")
    return tandem_home


def test_jobs_of_before_are_recorded_once_with_state_result_and_events(store: JobStore, folders: Path) -> None:
    done = import_folders(store)
    assert (done.added, done.known, done.unreadable) == (5, 0, (folders / "jobs" / "bad-1",))
    jobs = {job.id: job for job in store.page(limit=100).jobs}
    assert {job.id: job.state for job in jobs.values()} == {
        "new-1": State.PAUSED,
        "stopped-1": State.PAUSED,
        "failed-1": State.FAILED,
        "finished-1": State.FINISHED,
        "x-sweep-1": State.FINISHED,
    }
    finished, stopped = jobs["finished-1"], jobs["stopped-1"]
    assert finished.result is not None and finished.result["model"] == "x@1"
    assert finished.started_at is not None and finished.started_at.timestamp() == STARTED["time"]
    assert finished.ended_at is not None and finished.ended_at.timestamp() == DONE["time"]
    assert jobs["failed-1"].error == "disk full" and jobs["x-sweep-1"].kind is JobKind.SWEEP
    assert (stopped.attempt, stopped.handle, stopped.ended_at) == (3, "stopped-1.3", None)
    assert stopped.resources == Resources(min_workers=2, max_workers=2)
    events = [each.event for each in store.events("finished-1")]
    assert [type(event).name for event in events] == ["started", "step", "finished", "state"]
    assert isinstance(events[1], Step) and events[1].time == STEP["time"]
    assert isinstance(events[-1], StateChanged) and events[-1].action == "import"

    again = import_folders(store)
    assert (again.added, again.known) == (0, 5)
    assert {job.id: job for job in store.page(limit=100).jobs} == jobs


def test_a_job_that_runs_on_the_cluster_is_adopted_by_the_dispatcher(store: JobStore, folders: Path) -> None:
    import_folders(store, live=lambda folder: JobState.RUNNING if folder.id == "stopped-1" else None)
    (job,) = store.active()
    assert (job.id, job.state, job.handle, job.run_name) == ("stopped-1", State.RUNNING, "stopped-1.3", "stopped-1.3")
    taken = store.take_over(job.id, "a", 30.0)
    assert taken is not None and taken.lease is not None and taken.attempt == 3


def test_the_same_command_continues_an_imported_job(store: JobStore, folders: Path) -> None:
    import_folders(store)
    submitted = store.submit(folder_submission(JobFolder(folders / "jobs" / "stopped-1")))
    assert (submitted.is_new, submitted.job.state) == (False, State.QUEUED)
    claimed = store.claim("stopped-1", "a", 30.0)
    assert claimed is not None and claimed.run_name == "stopped-1.4"
    assert store.submit(folder_submission(JobFolder(folders / "jobs" / "new-1"))).job.state is State.QUEUED
    finished = store.submit(folder_submission(JobFolder(folders / "jobs" / "finished-1")))
    assert (finished.is_new, finished.job.state) == (False, State.FINISHED)
