"""`tandem slurm` on a machine without Slurm: scripts are shown, and what is missing is said before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tandem.cli.main import app
from tandem.cluster.slurm.folder import Connection, JobFolder, Submission
from tandem.cluster.tunnel import Tunnel


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TANDEM_HOME", str(folder))
    # No `sbatch` is found there.
    monkeypatch.setenv("PATH", str(tmp_path))
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["slurm", *arguments], env={"COLUMNS": "250"})
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def test_a_dry_run_shows_the_script_and_submits_nothing(home: Path) -> None:
    (home / "slurm.yaml").write_text("partition: gpu\ngpu_type: a100\n")
    result = CliRunner().invoke(
        app,
        [
            "slurm",
            "submit",
            "serve",
            "my-model",
            "--gpus-per-node",
            "2",
            "--site-set",
            "time=30",
            "--set",
            "gateway.replicas=2",
            "--dry-run",
        ],
    )
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for wanted in ("#SBATCH --partition=gpu", "#SBATCH --gres=gpu:a100:2", "#SBATCH --time=30", "#SBATCH --no-requeue"):
        assert wanted in lines
    assert any("slurm node" in line for line in lines)
    assert not (home / "slurm").exists()


def test_a_dry_run_hides_the_values_of_secrets(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_DATABASE_URL", "postgresql://ann:pw@db/tandem")
    (home / "slurm.yaml").write_text("environment: {HF_TOKEN: hf_x, NCCL_DEBUG: WARN}\n")
    status, shown = run("submit", "serve", "my-model", "--dry-run")
    assert status == 0 and "pw@db" not in shown and "hf_x" not in shown
    for wanted in ("# export TANDEM_DATABASE_URL=***", "# export HF_TOKEN=***", "# export NCCL_DEBUG=WARN"):
        assert wanted in shown


def fake(folder: Path, name: str, script: str) -> None:
    """A command of Slurm on the PATH."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_passwords_are_in_no_words_of_a_command_and_in_no_batch_script(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_DATABASE_URL", "postgresql://ann:pw@db/tandem")
    (home / "slurm.yaml").write_text("environment: {HF_TOKEN: hf_x}\n")
    fake(tmp_path, "scontrol", "exit 0")
    fake(tmp_path, "sbatch", f'echo "$@" > {tmp_path}/words; echo 7')
    fake(tmp_path, "srun", f'echo "$@" > {tmp_path}/words; exit 1')
    status, shown = run("submit", "serve", "my-model", "--detach")
    assert status == 0, shown
    (folder,) = (home / "slurm").iterdir()
    assert "pw@db" in (folder / "environment.sh").read_text()
    for path in (folder / "script.sh", tmp_path / "words"):
        assert "pw@db" not in path.read_text() and "hf_x" not in path.read_text()
    assert run("check")[0] != 0
    words = (tmp_path / "words").read_text()
    assert (
        "doctor" in words
        and "hf_x" not in words
        and [each.name for each in (home / "slurm").iterdir()] == [folder.name]
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("submit", "serve", "my-model"), "This machine has no `sbatch`"),
        (("submit", "serve", "my-model", "--site-set", "partitoin=gpu", "--dry-run"), "Did you mean 'partition'"),
        (("submit", "serve", "my-model", "--site", "none.yaml"), "No config file at none.yaml"),
        (("setup", "/shared/tandem", "--site-set", "login.host=-oProxyCommand=x"), "is no host for ssh"),
        (("info", "12"), "There is no Slurm job '12'"),
        (("tunnel", "12"), "There is no Slurm job '12'"),
    ],
)
def test_what_is_missing_is_said(home: Path, arguments: tuple[str, ...], said: str) -> None:
    status, shown = run(*arguments)
    assert status != 0 and said in shown
    assert not (home / "slurm").exists()


def test_a_job_that_slurm_refuses_leaves_nothing(home: Path, tmp_path: Path) -> None:
    for name, script in (("scontrol", "exit 0"), ("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    status, shown = run("submit", "serve", "my-model")
    assert status != 0 and "Slurm says: sbatch: error: invalid partition" in shown
    assert not list((home / "slurm").iterdir())


def test_the_key_of_a_job_is_in_the_json_alone(home: Path) -> None:
    folder = JobFolder.create(
        home, Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0, job_id="7")
    )
    folder.write_connection(
        Connection(job_id="7", state="ready", node="10.0.0.1", port=8000, models=("a",), api_key="tdm-x")
    )
    status, shown = run("info", "7")
    assert status == 0 and "http://10.0.0.1:8000/v1" in shown and "tdm-x" not in shown
    assert json.loads(CliRunner().invoke(app, ["slurm", "info", "7", "--json"]).stdout)["api_key"] == "tdm-x"


def test_an_app_is_stopped_only_while_it_runs(home: Path) -> None:
    JobFolder.create(home, Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0, job_id="7"))
    status, shown = run("stop", "7")
    assert status != 0 and "does not run" in shown


def test_a_sweep_over_several_nodes_needs_a_database_that_all_reach(home: Path) -> None:
    words = ("submit", "sweep", "--config", "job.yaml", "--param", "seed=1,2")
    status, shown = run(*words)
    assert status != 0 and "Set it to a PostgreSQL database" in shown
    status, shown = run(*words, "--at-once", "1")
    assert status != 0 and "No config file at job.yaml" in shown


def test_a_command_for_one_output_names_the_tasks_of_an_array(home: Path) -> None:
    JobFolder.create(
        home,
        Submission(kind="sweep", command=("slurm", "trial", "s"), nodes=1, gpus_per_node=0, job_id="7", tasks=(2, 3)),
    )
    status, shown = run("logs", "7")
    assert status != 0 and "Name one of its 2 tasks, such as 7_2" in shown


def test_a_tunnel_does_not_print_the_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_tunnel(self: Tunnel, port: int, on_open: Callable[[int], None]) -> None:
        on_open(port)

    monkeypatch.setattr(Tunnel, "run", run_tunnel)
    folder = JobFolder.create(
        home, Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0, job_id="7")
    )
    folder.write_connection(Connection(job_id="7", state="ready", node="10.0.0.1", port=8000, api_key="tdm-x"))
    status, shown = run("tunnel", "7")
    assert status == 0 and "tdm-x" not in shown and "`tandem slurm info 7 --json` prints the key" in shown
