"""The dispatcher's runner for Ray Jobs, on a real cluster."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import yaml

from tandem.cluster.local import LocalCluster, running_cluster
from tandem.config import DataConfig, TrainConfig, to_dict
from tandem.db.database import open_database
from tandem.db.schema import JobRow
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.dispatch.runner import RunState
from tandem.jobs.folder import JobFolder
from tandem.jobs.folder_import import FolderImport
from tandem.jobs.folder_jobs import folder_submission
from tandem.jobs.runners.ray import RayRunner
from tandem.jobs.tracking.logs import log_path
from tandem.jobs.work.records import Job
from tandem.jobs.work.rows import job_values, to_job
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import Failed
from tandem.sdk.slurm_attempt import run_attempt


def claimed(home: Path, name: str) -> Job:
    """A job in its first attempt, whose dataset does not exist."""
    folder = home / "jobs" / name
    folder.mkdir(parents=True)
    config = TrainConfig(name="x", data=DataConfig(path=str(home / "no-such-data")), steps=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    row = JobRow(number=1, **job_values(folder_submission(JobFolder(folder)), datetime.now(UTC)))
    return replace(to_job(row), attempt=1)


def test_an_attempt_is_submitted_once_found_by_its_name_and_its_end_is_known(
    session_home: Path, cluster: LocalCluster
) -> None:
    def client() -> JobClient:
        found = running_cluster()
        assert found is not None
        return JobClient(found)

    job = claimed(session_home, "ray-runner-1")
    runner, other = RayRunner(client), RayRunner(client)
    assert runner.find(job) is None and runner.state(job.run_name) is None
    assert runner.start(job) == other.start(job) == job.run_name == other.find(job)
    assert [each["id"] for each in JobFolder(session_home / "jobs" / job.id).submissions()] == [job.run_name]
    while (status := runner.state(job.run_name)) is not None and status.state is RunState.RUNNING:
        time.sleep(0.5)
    assert status is not None and status.state is RunState.FAILED
    assert not status.retryable and status.error
    runner.stop(job)


def test_a_job_that_a_command_submits_is_followed_its_log_is_kept_and_a_second_start_is_followed_too(
    session_home: Path, cluster: LocalCluster, tmp_path: Path
) -> None:
    folder = JobFolder(session_home / "jobs" / claimed(session_home, "by-command-1").id)
    command = JobClient(cluster)
    url = f"sqlite:///{tmp_path}/tandem.db"
    open_database(url, create=True).dispose()
    with JobStore(url) as store:
        importer = FolderImport(store, lambda: command)
        importer.every_s = 0.0
        runners = {"ray": RayRunner(lambda: command)}
        dispatcher = Dispatcher(store, runners, lambda: Capacity(cpus=2.0), chores=(importer,))
        for attempt in (1, 2):
            submission = command.submit(folder)
            assert submission == f"{folder.id}.{attempt}" and dispatcher.round()
            job = store.get(folder.id)
            assert (job.state, job.handle, job.attempt) == (State.RUNNING, submission, attempt)
            while not store.get(folder.id).state.ended:
                assert dispatcher.round()
                time.sleep(0.5)
            failed = store.get(folder.id)
            assert failed.state is State.FAILED and failed.error is not None and "no-such-data" in failed.error
            assert "no-such-data" in log_path(folder.path, attempt).read_text()
        dispatcher.close()


def test_an_attempt_of_a_slurm_job_runs_a_prepared_folder_on_the_cluster_of_the_job(
    session_home: Path, cluster: LocalCluster
) -> None:
    folder = JobFolder(session_home / "jobs" / claimed(session_home, "on-slurm-1").id)
    assert run_attempt(folder.id) != 0
    failed = folder.last(Failed)
    assert failed is not None and "no-such-data" in failed.error
    assert [each["id"] for each in folder.submissions()] == ["on-slurm-1.1"]
