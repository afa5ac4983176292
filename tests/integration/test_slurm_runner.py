"""The dispatcher's runner for Slurm on a real controller and node; a script stands in for Ray and the training on the node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from bench.harness.slurm import Slurm, slurm
from hosts import hosts, skipped_where_unavailable, wait_until

from tandem.cluster.slurm import submission as slurm_submission
from tandem.config import DataConfig, TrainConfig, to_dict
from tandem.config.slurm import SlurmSite
from tandem.db.schema import JobRow
from tandem.jobs.dispatch.runner import RunState, RunStatus
from tandem.jobs.runners.slurm import SlurmRunner
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.rows import job_values, to_job
from tandem.jobs.work.states import JobKind

pytestmark = [
    pytest.mark.slow,  # a Slurm cluster on two hosts, and jobs that wait in its queue
    pytest.mark.timeout(900),
]

NODE = """\
#!/bin/sh
# Called as `node.sh slurm node FOLDER`: runs until it is told to end, and then asks to be queued again, as training does.
echo "started on $SLURMD_NODENAME"
[ -e "{home}/fails" ] && exit 3
while [ ! -e "$3/stop" ]; do sleep 0.2; done
exit 75
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Slurm, Path]]:
    folder = tmp_path_factory.mktemp("slurm")
    shared = folder / "shared"
    (shared / "home").mkdir(parents=True, mode=0o700)
    with skipped_where_unavailable(), hosts(1, folder / "hosts", [shared]) as compute:
        with slurm(compute, shared / "slurm") as found:
            yield found, shared / "home"


def claimed(home: Path, name: str) -> Job:
    folder = home / "jobs" / name
    folder.mkdir(parents=True)
    config = TrainConfig(name="x", data=DataConfig(path="d"), steps=1)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    submission = JobSubmission(kind=JobKind.TRAIN, id=name, name="x", spec={}, runner="slurm")
    return replace(to_job(JobRow(number=1, **job_values(submission, datetime.now(UTC)))), attempt=1)


def test_an_attempt_is_one_slurm_job_that_is_found_warned_and_not_queued_again(
    cluster: tuple[Slurm, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, home = cluster
    monkeypatch.setenv("SLURM_CONF", str(found.config))
    monkeypatch.setenv("TANDEM_HOME", str(home))
    node = home / "node.sh"
    node.write_text(NODE.format(home=home))
    os.chmod(node, 0o755)
    monkeypatch.setattr(slurm_submission, "tandem_words", lambda _: (str(node),))
    runner, other = (SlurmRunner(lambda: SlurmSite(cpus_per_node=1)) for _ in range(2))

    def listed() -> list[str]:
        return found.run("squeue", "--noheader", "--format=%j %T").splitlines()

    job = claimed(home, "long-1")
    assert runner.start(job) == other.start(job) == "long-1.1" == other.find(job)
    wait_until(lambda: listed() == ["long-1.1 RUNNING"], 60, "the job does not run")
    log = home / "slurm" / "long-1.1" / "output.log"
    wait_until(lambda: log.exists() and "started on" in log.read_text(), 60, "the node's program has not started")
    assert runner.state("long-1.1") == RunStatus(state=RunState.RUNNING)
    runner.stop(job)
    runner.stop(job)
    wait_until(lambda: not listed(), 60, "the job did not end")
    assert other.state("long-1.1") == RunStatus(state=RunState.STOPPED)
    assert (home / "jobs" / "long-1" / "logs" / "attempt-1.log").read_text().startswith("started on")

    (home / "fails").touch()
    broken = claimed(home, "broken-1")
    runner.start(broken)
    wait_until(lambda: not listed(), 60, "the job did not end")
    status = runner.state("broken-1.1")
    assert status is not None and (status.state, status.retryable) == (RunState.FAILED, True)
    assert "ended as FAILED" in str(status.error) and "exit status 3" in str(status.error)
