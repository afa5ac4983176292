"""Batch scripts and what Slurm's commands print, without Slurm; bash itself reads the scripts."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tandem.cluster.slurm.commands import parse_job
from tandem.cluster.slurm.folder import LOST_S, Connection, Head, JobFolder, Submission, find
from tandem.cluster.slurm.script import REQUEUE_STATUS, JobRequest, array_range, exports, options, render
from tandem.config.load import from_dict
from tandem.config.slurm import ContainerConfig, SlurmSite
from tandem.errors import ClusterError, ConfigError


def request_in(folder: Path, kind: str = "serve") -> JobRequest:
    return JobRequest(
        submission=Submission(kind=kind, command=(kind,), nodes=2, gpus_per_node=4),
        folder=JobFolder(folder),
        tandem=("/opt/env/bin/python", "-m", "tandem"),
        variables={"TANDEM_HOME": str(folder), "TANDEM_RUNTIME_DIR": "/tmp/ts", "GREETING": "it's $HOME"},
        home=folder,
    )


def test_the_options_are_those_of_the_site_and_of_the_request() -> None:
    site = SlurmSite(
        partition="gpu", account="lab", qos="normal", constraint="ib&a100", time="1-12:00:00", cpus_per_node=16, memory="64G",
        gpu_type="a100", options=("--exclusive",), warning_s=90,
    )  # fmt: skip
    assert options(site, request_in(Path("/shared/job"))) == [
        "--job-name=tandem-serve",
        "--output=/shared/job/output.log",
        "--open-mode=append",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=1-12:00:00",
        "--signal=B:USR1@90",
        "--no-requeue",
        "--partition=gpu",
        "--account=lab",
        "--qos=normal",
        "--constraint=ib&a100",
        "--cpus-per-task=16",
        "--mem=64G",
        "--gres=gpu:a100:4",
        "--exclusive",
    ]


def test_each_task_of_an_array_has_a_folder_and_an_output_of_its_own() -> None:
    request = request_in(Path("/shared/job"), "sweep")
    request = replace(request, submission=replace(request.submission, tasks=(1, 2, 3), tasks_at_once=2))
    found = options(SlurmSite(), request)
    assert "--array=1-3%2" in found and "--output=/shared/job/tasks/%a/output.log" in found and "--requeue" in found
    assert array_range((2, 5), 0) == "2,5" and array_range((4,), 1) == "4-4%1"


def test_a_container_runs_the_same_command_with_the_home_and_its_binds() -> None:
    container = ContainerConfig(image="/images/tandem 1.sif", binds=("/scratch",), arguments=("--nv",))
    script = render(SlurmSite(container=container), request_in(Path("/shared/job")))
    assert (
        "apptainer exec --bind /shared/job --bind /scratch --nv '/images/tandem 1.sif' /opt/env/bin/python -m tandem slurm node "
        "/shared/job &" in script
    )


def test_variables_are_in_a_private_file_and_not_in_the_script(tmp_path: Path) -> None:
    request = request_in(tmp_path)
    site = SlurmSite(environment={"WANDB_API_KEY": "abc123", "MODE": "fast"})
    request.folder.write_environment(exports(site, {"TANDEM_DATABASE_URL": "postgresql://a:pw@db/x"}))
    script = render(site, request)
    assert "abc123" not in script and f". {tmp_path}/environment.sh || exit 1" in script
    assert stat.S_IMODE(request.folder.environment.stat().st_mode) == 0o600
    shown = "export WANDB_API_KEY=abc123\nexport MODE=fast\nexport TANDEM_DATABASE_URL=postgresql://a:pw@db/x\n"
    assert request.folder.environment.read_text() == shown
    hidden = exports(site, {"TANDEM_DATABASE_URL": "postgresql://a:pw@db/x"}, hidden=True)
    assert hidden == ["export WANDB_API_KEY=***", "export MODE=fast", "export TANDEM_DATABASE_URL=***"]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with an `srun` that runs its command here, and a `scontrol` that writes down its arguments."""
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "srun").write_text('#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n')
    (folder / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {folder}/scontrol.log\n')
    for tool in folder.iterdir():
        tool.chmod(0o755)
    return folder


def start(
    tools: Path, folder: Path, command: str, *, requeue: bool = False, task: int | None = None
) -> subprocess.Popen[bytes]:
    """Run a batch script whose `tandem` is a shell command, as Slurm would; of an array, one `task`."""
    tandem = folder / "tandem"
    tandem.write_text(f"#!/bin/bash\n{command}\n")
    tandem.chmod(0o755)
    request = replace(request_in(folder, "train" if requeue else "serve"), tandem=(str(tandem),))
    if task is not None:
        request = replace(request, submission=replace(request.submission, tasks=(1, 2, 3)))
    script = folder / "script.sh"
    site = SlurmSite(environment={"SITE": 'a "b"'}, commands=("export EXTRA=1",))
    script.write_text(render(site, request))
    request.folder.write_environment(exports(site, request.variables))
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_ARRAY_TASK_ID": str(task)} if task is not None else {}
    return subprocess.Popen(["bash", str(script)], env=environment)


def test_variables_reach_the_nodes_letter_for_letter(tools: Path, tmp_path: Path) -> None:
    process = start(tools, tmp_path, f'printf "%s|%s|%s|%s" "$GREETING" "$SITE" "$EXTRA" "$*" > {tmp_path}/seen')
    assert process.wait(20) == 0
    assert (tmp_path / "seen").read_text() == f'it\'s $HOME|a "b"|1|slurm node {tmp_path}'


def test_a_task_of_an_array_gets_its_folder_its_runtime_folder_and_its_warning(tools: Path, tmp_path: Path) -> None:
    task = JobFolder(tmp_path).task(2)
    task.path.mkdir(parents=True)
    command = f'echo "$* $TANDEM_RUNTIME_DIR" > {tmp_path}/up; until [ -e {task.stop_file} ]; do sleep 0.1; done'
    process = start(tools, tmp_path, command, task=2)
    while not (tmp_path / "up").exists() or not (tmp_path / "up").read_text():
        time.sleep(0.05)
    assert (tmp_path / "up").read_text() == f"slurm node {task.path} /tmp/ts-2\n"
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0 and task.stop_reason("7.0") == "time-limit"


def test_the_warning_of_slurm_reaches_the_run_as_a_file_and_the_step_goes_on(tools: Path, tmp_path: Path) -> None:
    process = start(tools, tmp_path, f"touch {tmp_path}/up; until [ -e {tmp_path}/go ]; do sleep 0.1; done; exit 3")
    folder = JobFolder(tmp_path)
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    assert folder.stop_reason("7.0") is None
    process.send_signal(signal.SIGUSR1)
    while folder.stop_reason("7.0") is None:
        time.sleep(0.05)
    assert folder.stop_reason("7.0") == "time-limit" and folder.stop_reason("7.1") is None
    assert process.poll() is None
    (tmp_path / "go").touch()
    assert process.wait(20) == 3


@pytest.mark.parametrize(
    ("status", "requeue", "asked"), [(REQUEUE_STATUS, True, True), (1, True, False), (75, False, False)]
)
def test_only_a_run_that_asks_for_it_is_queued_again(
    tools: Path, tmp_path: Path, status: int, requeue: bool, asked: bool
) -> None:
    assert start(tools, tmp_path, f"exit {status}", requeue=requeue).wait(20) == status
    log = tools / "scontrol.log"
    assert log.exists() == asked
    if asked:
        assert log.read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partition": "gpu long"}, "one word"),
        ({"time": "an hour"}, "02:00:00"),
        ({"options": ["exclusive"]}, "option of sbatch"),
        ({"environment": {"A B": "c"}}, "name of a variable"),
        ({"commands": ["a\nb"]}, "one line"),
        ({"login": {"host": "-oProxyCommand=x"}}, "no host"),
        ({"login": {"host": "a", "port": 70000}}, "between 1 and 65535"),
        ({"container": {"image": ""}}, "container.image is empty"),
        ({"partitoin": "gpu"}, "partition"),
    ],
)
def test_a_site_that_cannot_be_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_dict(SlurmSite, values)


def test_what_slurm_says_of_a_job_is_read() -> None:
    shown = (
        "JobId=12 JobName=tandem-serve UserId=ann(1000) JobState=PENDING Reason=Resources Dependency=(null) "
        "StartTime=Unknown EndTime=Unknown NodeList=(null) Command=/shared/a b/script.sh"
    )
    job = parse_job(shown)
    assert (job.job_id, job.state, job.reason, job.nodes, job.ends_at) == ("12", "PENDING", "Resources", "", None)
    assert job.waits and not job.runs
    running = parse_job("JobId=12 JobState=RUNNING Reason=None EndTime=2026-11-30T10:00:00 NodeList=n[1-2]")
    assert running.runs and running.nodes == "n[1-2]" and running.reason == ""
    assert running.ends_at == datetime(2026, 11, 30, 10).astimezone(UTC)


def test_a_jobs_folder_is_private_and_found_by_id_name_and_latest(tmp_path: Path) -> None:
    first = JobFolder.create(tmp_path, Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0))
    first.write_submission(replace(first.submission(), job_id="41", submitted_at="2026-01-01T00:00:00+00:00"))
    second = JobFolder.create(tmp_path, Submission(kind="train", command=("train", "submit"), nodes=2, gpus_per_node=0))
    first.write_head(Head(run="41.0", address="10.0.0.1:6379"))
    first.write_connection(Connection(job_id="41", state="ready", api_key="tdm-x"))
    for path in (first.path, first.token, first.path / "connection.json"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert (
        find(tmp_path, "41") == first and find(tmp_path, "latest") == second and find(tmp_path, second.name) == second
    )
    with pytest.raises(ClusterError, match="The newest are: 41"):
        find(tmp_path, "99")
    first.stop()
    assert first.stop_reason("41.0") == "user"


def test_a_ready_job_without_heartbeats_for_a_minute_is_lost(tmp_path: Path) -> None:
    folder = JobFolder.create(tmp_path, Submission(kind="serve", command=("serve",), nodes=1, gpus_per_node=0))
    now = datetime.now(UTC)
    connection = Connection(job_id="41", state="ready", node="10.0.0.1", port=8000, api_key="tdm-x")
    folder.write_connection(connection.beating(now - timedelta(seconds=30)))
    alive = folder.connection()
    assert alive.state == "ready"
    dead = connection.beating(now - timedelta(seconds=LOST_S + 5))
    folder.write_connection(dead)
    lost = folder.connection()
    assert lost.state == "lost" and "last heartbeat" in lost.message
    assert replace(dead, state="ended").checked(now).state == "ended"


def test_tasks_of_an_array_are_found_by_their_numbers(tmp_path: Path) -> None:
    submission = Submission(kind="sweep", command=("slurm", "trial", "s"), nodes=1, gpus_per_node=0, tasks=(1, 3))
    folder = JobFolder.create(tmp_path, submission)
    for number in submission.tasks:
        folder.create_task(number, replace(submission, command=(*submission.command, str(number)), tasks=()))
    folder.write_job_id("50")
    found = find(tmp_path, "50_3")
    assert found == folder.task(3) and found.submission().job_id == "50_3" and not found.runs
    assert found.submission().command == ("slurm", "trial", "s", "3") and find(tmp_path, "50") == folder
    with pytest.raises(ClusterError, match="There is no Slurm job '50_2'"):
        find(tmp_path, "50_2")
    found.write_head(Head(run="51.0", address="10.0.0.1:6379"))
    assert found.runs
    found.stop()
    assert found.stop_reason("51.0") == "user"
