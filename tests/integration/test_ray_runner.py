"""The dispatcher's runner for Ray Jobs, on a real cluster."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import yaml

from tandem.cluster.local import LocalCluster, running_cluster
from tandem.config import DataConfig, TrainConfig, to_dict
from tandem.db.schema import JobRow
from tandem.jobs.client import JobClient
from tandem.jobs.dispatch.runner import RunState
from tandem.jobs.folder import JobFolder
from tandem.jobs.folder_jobs import folder_submission
from tandem.jobs.runners.ray import RayRunner
from tandem.jobs.work.records import Job
from tandem.jobs.work.rows import job_values, to_job


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
