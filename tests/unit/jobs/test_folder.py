"""The state of a job follows from its files and the cluster's answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem.config import DataConfig, TrainConfig, to_dict
from tandem.errors import JobError
from tandem.jobs.folder import JobFolder, JobState, find_job, job_folders


def make_job(home: Path, name: str, *events: dict[str, Any]) -> JobFolder:
    folder = home / "jobs" / name
    folder.mkdir(parents=True)
    config = TrainConfig(name="x", data=DataConfig(path="d"), steps=30)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return JobFolder(folder)


STEP = {"event": "step", "step": 7, "steps": 30, "loss": 2.5, "tokens_per_s": 900.0}
DONE = {"event": "finished", "model": "x@1", "loss": 1.0, "steps": 30, "seconds": 3}


def test_a_job_without_submissions_is_new(tandem_home: Path) -> None:
    summary = make_job(tandem_home, "a-1").summary()
    assert (summary.state, summary.step, summary.steps) == (JobState.NEW, 0, 30)


def test_a_running_job_shows_its_newest_step(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", {"event": "started"}, {**STEP, "step": 6}, STEP)
    job.add_submission("a-1.1", "http://x")
    summary = job.summary(JobState.RUNNING)
    assert (summary.state, summary.step, summary.loss, summary.tokens_per_s) == (JobState.RUNNING, 7, 2.5, 900.0)


def test_a_finished_job_names_its_model_as_long_as_its_export_is_there(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", {"event": "started"}, STEP, DONE)
    job.add_submission("a-1.1", "http://x")
    assert job.finished() is None
    job.export.mkdir()
    assert job.finished() is not None
    assert (job.summary().state, job.summary().model) == (JobState.FINISHED, "x@1")


def test_a_job_that_started_again_after_it_finished_is_not_finished(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", DONE, {"event": "started"})
    job.export.mkdir()
    assert job.finished() is None


def test_a_failed_job_has_its_error(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", {"event": "started"}, {"event": "failed", "error": "disk full"})
    job.add_submission("a-1.1", "http://x")
    assert (job.summary().state, job.summary().error) == (JobState.FAILED, "disk full")


def test_a_job_whose_cluster_is_gone_counts_as_stopped(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", {"event": "started"}, STEP)
    job.add_submission("a-1.1", "http://x")
    assert job.summary().state is JobState.STOPPED


def test_a_half_written_event_is_ignored(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", STEP)
    with (job.path / "events.jsonl").open("a") as file:
        file.write('{"event": "st')
    assert [e["event"] for e in job.events()] == ["step"]


def test_a_job_is_found_by_a_prefix_of_its_id(tandem_home: Path) -> None:
    make_job(tandem_home, "alpha-11")
    make_job(tandem_home, "alpha-22")
    make_job(tandem_home, "beta-33")
    assert find_job("bet").id == "beta-33"
    assert len(list(job_folders())) == 3
    with pytest.raises(JobError, match="could be 2 jobs"):
        find_job("alpha")
    with pytest.raises(JobError, match="Did you mean 'beta-33'"):
        find_job("beta-34")


def test_a_summary_counts_faults_restarts_and_repeated_steps(tandem_home: Path) -> None:
    job = make_job(
        tandem_home,
        "a-1",
        {"event": "started", "workers": 4, "layout": "fsdp2", "resumed_from": None},
        {**STEP, "step": 14},
        {"event": "checkpoint", "step": 10, "path": "p", "time": 5.0},
        {"event": "fault", "kind": "node", "rank": 2, "reason": "gone", "step": 14},
        {"event": "resized", "from": 4, "to": 2, "layout": "fsdp2", "reason": "gone", "step": 10},
        {"event": "restart", "reason": "gone", "resumed_from": 10},
        {"event": "skipped", "step": 11, "reason": "not finite: step 11"},
        {**STEP, "step": 13},
        {"event": "fault", "kind": "driver", "rank": None, "reason": "killed", "step": 10},
        {"event": "started", "workers": 2, "layout": "ddp", "resumed_from": 10},
        {"event": "slow", "rank": 1, "reason": "rank 1 is slow"},
    )
    found = job.summary()
    assert (found.workers, found.layout, found.checkpoint, found.checkpoint_at) == (2, "ddp", 10, 5.0)
    assert (found.faults, found.restarts, found.repeated_steps) == ({"node": 1, "driver": 1}, 2, 4 + 3)
    assert (found.skipped_steps, found.warnings) == (1, ["not finite: step 11", "rank 1 is slow"])


def test_a_job_that_was_told_to_stop_is_stopped_and_not_failed(tandem_home: Path) -> None:
    job = make_job(tandem_home, "a-1", {"event": "started"}, {"event": "stopped", "reason": "asked"})
    assert job.summary().state is JobState.STOPPED
