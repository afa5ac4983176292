"""Attempts as Slurm jobs, with what Slurm's commands print: what each state means, and which commands are called."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tandem.cluster.slurm.commands import parse_job
from tandem.cluster.slurm.folder import LEAVE_FILE, JobFolder
from tandem.config import DataConfig, TrainConfig, to_dict
from tandem.config.slurm import SlurmSite
from tandem.db.schema import JobRow
from tandem.errors import ClusterError, JobError
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.folder import JobFolder as TrainingFolder
from tandem.jobs.runners.slurm import SlurmRunner, status_of
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.rows import job_values, to_job
from tandem.jobs.work.states import JobKind

# Slurm 22.05's own lines, shortened.
LINE = (
    "JobId=7 JobName=a-1.1 UserId=ann(1000) JobState={state} Reason={reason} Requeue=1 Restarts=0 ExitCode={code} "
    "EndTime=Unknown NodeList=(null)"
)

SHOW = f"""\
if [ ! -e state ]; then echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; fi
echo '{LINE}' | sed "s/{{state}}/$(cat state)/; s/{{reason}}/None/; s/{{code}}/0:0/"
"""
COMMANDS = {
    "sbatch": "echo 7",
    "squeue": "cat listed 2>/dev/null || true",
    "scontrol": SHOW,
    "scancel": "true",
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
}


class Slurm:
    """Slurm's commands, as programs that note their words and print what the test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in COMMANDS.items():
            program = folder / name
            program.write_text(f'#!/bin/sh\ncd "{folder}"\necho "{name} $*" >> calls\n{text}\n')
            program.chmod(0o755)

    def calls(self, name: str) -> list[str]:
        try:
            lines = (self.folder / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if line.startswith(name)]

    def say(self, state: str) -> None:
        (self.folder / "state").write_text(state)


@pytest.fixture
def slurm(tandem_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    tandem_home.chmod(0o700)
    return Slurm(folder)


@pytest.fixture
def runner(slurm: Slurm) -> SlurmRunner:
    return SlurmRunner(lambda: SlurmSite(partition="gpu"))


def training(home: Path, *events: dict[str, object], name: str = "a-1") -> TrainingFolder:
    folder = home / "jobs" / name
    folder.mkdir(parents=True, exist_ok=True)
    config = to_dict(TrainConfig(name="x", data=DataConfig(path="d"), steps=3))
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return TrainingFolder(folder)


def claimed(kind: JobKind = JobKind.TRAIN) -> Job:
    submission = JobSubmission(kind=kind, id="a-1", name="a", spec={"nodes": 2, "gpus_per_node": 4}, runner="slurm")
    return replace(to_job(JobRow(number=1, **job_values(submission, datetime.now(UTC)))), attempt=1)


def slurm_folder(home: Path) -> JobFolder:
    return JobFolder(home / "slurm" / "a-1.1")


# ---- states ----


@pytest.mark.parametrize("state", ["PENDING", "CONFIGURING", "REQUEUED", "RUNNING", "COMPLETING", "SUSPENDED"])
def test_an_attempt_that_slurm_queues_runs_or_queues_again_runs(state: str, tandem_home: Path) -> None:
    found = parse_job(LINE.format(state=state, reason="BeginTime", code="0:0"))
    assert status_of(found, training(tandem_home), since=0.0, was_stopped=False) == RunStatus(state=RunState.RUNNING)


@pytest.mark.parametrize(
    ("state", "code", "retryable"),
    [
        ("NODE_FAIL", "0:0", True),
        ("BOOT_FAIL", "0:0", True),
        ("PREEMPTED", "0:15", True),
        ("TIMEOUT", "0:0", True),
        ("FAILED", "1:0", True),
        ("OUT_OF_MEMORY", "0:125", False),
        ("DEADLINE", "0:0", False),
    ],
)
def test_a_failure_of_the_cluster_is_worth_another_attempt(
    state: str, code: str, retryable: bool, tandem_home: Path
) -> None:
    found = parse_job(LINE.format(state=state, reason="None", code=code))
    status = status_of(found, training(tandem_home), since=0.0, was_stopped=False)
    assert status is not None and (status.state, status.retryable) == (RunState.FAILED, retryable)
    assert status.error == f"Slurm's job 7 ended as {state}, with exit status {code.partition(':')[0]}."
    stopped = status_of(found, training(tandem_home), since=0.0, was_stopped=True)
    assert stopped == RunStatus(state=RunState.STOPPED), "it was told to leave"


def test_the_runs_own_end_counts_and_one_before_the_submission_does_not(tandem_home: Path) -> None:
    failed = parse_job(LINE.format(state="FAILED", reason="NonZeroExitCode", code="1:0"))
    folder = training(tandem_home, {"event": "failed", "time": 100.0, "error": "disk full"})
    status = status_of(failed, folder, since=50.0, was_stopped=False)
    assert status == RunStatus(state=RunState.FAILED, error="disk full", retryable=False)
    late = status_of(failed, folder, since=150.0, was_stopped=False)
    assert late is not None and late.retryable and "NonZeroExitCode" in str(late.error)
    cancelled = parse_job(LINE.format(state="CANCELLED", reason="None", code="0:15"))
    assert status_of(cancelled, training(tandem_home), since=0.0, was_stopped=False) == RunStatus(
        state=RunState.STOPPED
    )
    assert status_of(None, training(tandem_home), since=0.0, was_stopped=False) is None
    folder = training(tandem_home, {"event": "finished", "time": 100.0, "model": "x@1", "loss": 1.0})
    folder.export.mkdir()
    for found in (None, parse_job(LINE.format(state="COMPLETED", reason="None", code="0:0"))):
        done = status_of(found, folder, since=0.0, was_stopped=True)
        assert done is not None and done.state is RunState.FINISHED and done.result is not None
        assert done.result["model"] == "x@1"


# ---- commands ----


def test_an_attempt_is_submitted_once_by_its_name_whoever_asks(
    runner: SlurmRunner, slurm: Slurm, tandem_home: Path
) -> None:
    training(tandem_home)
    job = claimed()
    assert runner.find(job) is None and runner.state("a-1.1") is None
    other = SlurmRunner(lambda: SlurmSite())
    assert runner.start(job) == other.start(job) == "a-1.1" == other.find(job)
    folder = slurm_folder(tandem_home)
    assert slurm.calls("sbatch") == [f"sbatch --parsable --job-name=a-1.1 {folder.script}"]
    script = folder.script.read_text()
    assert "--nodes=2" in script and "--gres=gpu:4" in script and "--partition=gpu" in script
    assert "slurm attempt" not in script and folder.submission().command == ("slurm", "attempt", "a-1")
    slurm.say("RUNNING")
    assert runner.state("a-1.1") == RunStatus(state=RunState.RUNNING)
    slurm.say("COMPLETED")
    folder.log.write_text("first line\n")
    assert runner.state("a-1.1") is not None
    assert (tandem_home / "jobs" / "a-1" / "logs" / "attempt-1.log").read_text() == "first line\n"


def test_an_attempt_whose_dispatcher_died_before_it_wrote_the_id_down_is_found_by_its_name(
    runner: SlurmRunner, slurm: Slurm, tandem_home: Path
) -> None:
    training(tandem_home)
    runner.start(claimed())
    folder = slurm_folder(tandem_home)
    folder.write_submission(replace(folder.submission(), job_id=None))
    (slurm.folder / "listed").write_text("7\n")
    assert runner.find(claimed()) == runner.start(claimed()) == "a-1.1"
    assert folder.submission().job_id == "7" and len(slurm.calls("sbatch")) == 1
    assert slurm.calls("squeue")[-1] == "squeue --noheader --me --states=all --name=a-1.1 --format=%i"


def test_a_stop_warns_once_then_cancels_and_cancels_at_once_what_waits(
    runner: SlurmRunner, slurm: Slurm, tandem_home: Path
) -> None:
    training(tandem_home)
    job = claimed()
    runner.start(job)
    slurm.say("RUNNING")
    runner.stop(job)
    runner.stop(job)
    assert slurm.calls("scancel") == ["scancel --batch --signal=USR1 7"]
    leave = slurm_folder(tandem_home).path / LEAVE_FILE
    os.utime(leave, (time.time() - 3600, time.time() - 3600))
    runner.stop(job)
    assert slurm.calls("scancel")[1:] == ["scancel 7"]
    slurm.say("PENDING")
    os.utime(leave)
    runner.stop(job)
    assert slurm.calls("scancel")[2:] == ["scancel 7"]
    slurm.say("CANCELLED")
    runner.stop(job)
    assert len(slurm.calls("scancel")) == 3 and runner.state("a-1.1") == RunStatus(state=RunState.STOPPED)


def test_a_start_that_comes_after_the_stop_submits_nothing(
    runner: SlurmRunner, slurm: Slurm, tandem_home: Path
) -> None:
    training(tandem_home)
    runner.stop(claimed())
    assert runner.state(runner.start(claimed())) == RunStatus(state=RunState.STOPPED)
    assert slurm.calls("sbatch") == []


def test_a_refusal_and_another_kind_of_job_start_nothing(runner: SlurmRunner, slurm: Slurm, tandem_home: Path) -> None:
    training(tandem_home)
    (slurm.folder / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(ClusterError, match="invalid partition specified: gpu"):
        runner.start(claimed())
    assert runner.find(claimed()) is None
    with pytest.raises(JobError, match="a-1 is of kind sweep, and the Slurm runner runs train"):
        runner.start(claimed(JobKind.SWEEP))
