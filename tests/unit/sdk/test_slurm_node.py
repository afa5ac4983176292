"""The first node of a Slurm job, without Slurm and Ray."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from tandem.cluster import node
from tandem.cluster.slurm.folder import Connection, JobFolder, Submission
from tandem.sdk import slurm_node


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobFolder:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for name, value in {"TANDEM_HOME": str(home), "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_node, "node_address", lambda: "127.0.0.1")
    monkeypatch.setattr(node, "start", lambda words, slot: None)
    monkeypatch.setattr(node, "stop", lambda remove=False: 0)
    submission = Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0, job_id="7")
    return JobFolder.create(home, submission)


@pytest.mark.parametrize("error", [ValueError("no such value"), OSError(28, "No space left on device"), SystemExit(3)])
def test_every_exception_that_ends_the_run_is_written_down(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*arguments: object) -> int:
        raise error

    monkeypatch.setattr(slurm_node, "_run_command", fail)
    with pytest.raises(type(error)):
        slurm_node.run_node(folder)
    connection = folder.connection()
    assert connection.state == "failed" and str(error) in connection.message


def test_the_key_goes_to_the_app_only_while_its_process_lives(
    folder: JobFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        returncode: int | None = None

        def poll(self) -> int | None:
            return self.returncode

    def ask(host: str, port: int, key: str) -> tuple[str, ...]:
        sent.append(key)
        return ("tiny",)

    process, sent = Process(), list[str]()
    monkeypatch.setattr(slurm_node, "is_ready", lambda host, port: True)
    monkeypatch.setattr(slurm_node, "models", ask)
    connection = Connection(job_id="7", state="starting", node="127.0.0.1", port=8000, api_key="tdm-x")
    process.returncode = 1
    assert slurm_node._ready(connection, folder.submission(), process) is None and sent == []  # type: ignore[arg-type]
    process.returncode = None
    ready = slurm_node._ready(connection, folder.submission(), process)  # type: ignore[arg-type]
    assert ready is not None and (ready.state, ready.models, sent) == ("ready", ("tiny",), ["tdm-x"])


def test_a_job_that_runs_writes_heartbeats(folder: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "python"
    command.write_text("#!/bin/sh\nsleep 0.5\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    monkeypatch.setattr(slurm_node, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(slurm_node, "POLL_S", 0.05)
    written: list[Connection] = []
    monkeypatch.setattr(JobFolder, "write_connection", lambda self, connection: written.append(connection))
    submission = Submission(kind="train", command=("train", "submit"), nodes=1, gpus_per_node=0)
    assert slurm_node._run_command(folder, submission, "127.0.0.1", "127.0.0.1:1", threading.Event()) == 0
    beats = [each for each in written if each.state == "ready"]
    assert len(beats) >= 3 and all(each.heartbeat_at for each in beats) and written[-1].state == "ended"


@pytest.mark.parametrize(("name", "status", "removed"), [("ts-abc", 0, True), ("ts-abc", 1, False), ("own", 0, False)])
def test_the_runtime_folder_of_a_job_that_has_not_failed_is_removed(
    folder: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: int, removed: bool
) -> None:
    monkeypatch.setenv("TANDEM_RUNTIME_DIR", str(tmp_path / name))
    calls: list[bool] = []
    monkeypatch.setattr(node, "stop", lambda remove=False: calls.append(remove))
    monkeypatch.setattr(slurm_node, "_run_command", lambda *arguments: status)
    assert slurm_node.run_node(folder) == status
    assert calls == [False, *([True] if removed else [])]
