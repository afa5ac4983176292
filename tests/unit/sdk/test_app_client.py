"""`tandem.Client` and the examples against an echo engine's own server: real HTTP, no Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import tandem
from tandem.cluster.slurm.folder import Connection, JobFolder, Submission, find
from tandem.cluster.tunnel import AppEndedError, Target
from tandem.errors import ClusterError, ConfigError, UnknownModelError
from tandem.sdk import slurm

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("TANDEM_HOME", str(folder))
    return folder


def add_job(home: Path, connection: Connection) -> None:
    folder = JobFolder.create(
        home,
        Submission(kind="serve", command=("serve", "up"), nodes=1, gpus_per_node=0, job_id=connection.job_id),
    )
    folder.write_connection(connection)


def test_a_question_and_a_conversation_are_answered_whole_or_in_pieces(url: str) -> None:
    with tandem.Client(url) as client:
        assert client.models() == ["echo"]
        assert client.chat("a b c") == "a b c"
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert client.chat([*messages, {"role": "user", "content": "d e f"}], max_tokens=3).split() == ["a", "b", "d"]
        assert "".join(client.stream("a b", model="echo")) == "a b"
        assert [output["text"] for output in client.generate(["a", "b"])] == ["a", "b"]
        assert client.openai().models.list().data[0].id == "echo"


def test_an_unknown_model_is_refused_with_what_is_served(url: str) -> None:
    with pytest.raises(UnknownModelError, match="Served: echo"):
        tandem.Client(url).chat("a", model="ecko")


def test_a_slurm_jobs_app_is_asked_at_its_node_with_its_key(url: str, home: Path) -> None:
    port = urlsplit(url).port or 0
    add_job(home, Connection(job_id="7", state="ready", node="127.0.0.1", port=port, api_key="tdm-x", models=("echo",)))
    with tandem.Client.from_slurm("7") as client:
        assert (client.base_url, client.api_key) == (f"{url}/v1", "tdm-x")
        assert client.chat("a b") == "a b"


def test_what_keeps_a_job_from_being_reached_is_said(home: Path) -> None:
    with pytest.raises(ClusterError, match="There is no Slurm job '7'"):
        tandem.Client.from_slurm("7")
    add_job(home, Connection(job_id="8", state="starting"))
    with pytest.raises(ClusterError, match="Job 8 is starting: there is no app to reach"):
        tandem.Client.from_slurm("8")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    add_job(home, Connection(job_id="9", state="ready", node="127.0.0.1", port=port, api_key="tdm-x"))
    with pytest.raises(ClusterError, match=r"does not reach 127\.0\.0\.1:\d+.*login: \{host: USER@HOST\}"):
        tandem.Client.from_slurm("9")
    lost = Connection(job_id="10", state="ready", node="127.0.0.1", port=port, api_key="tdm-x")
    add_job(home, lost.beating(datetime.now(UTC) - timedelta(minutes=2)))
    with pytest.raises(ClusterError, match="Job 10 is lost: there is no app to reach"):
        tandem.Client.from_slurm("10")
    with pytest.raises(ConfigError, match="No config file"):
        tandem.Client.from_slurm("9", site=home / "none.yaml")


def test_a_tunnel_ends_when_its_job_is_lost(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "FOLLOW_S", 0.0)
    job = Connection(job_id="7", state="ready", node="10.0.0.1", port=8000, api_key="tdm-x")
    add_job(home, job.beating(datetime.now(UTC)))
    follow = slurm.JobReader(None)._follow("7")
    assert follow() == Target("job 7", "10.0.0.1", 8000)
    find(home, "7").write_connection(job.beating(datetime.now(UTC) - timedelta(minutes=2)))
    with pytest.raises(AppEndedError, match="Job 7 is lost"):
        follow()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_as_its_docstring_says(path: Path, url: str) -> None:
    keys = {"TANDEM_API_URL": url, "TANDEM_API_KEY": "x", "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "x"}
    done = subprocess.run(
        [sys.executable, str(path)], env={**os.environ, **keys}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ("import os" if "many" in path.stem else "What does os.path.join do?") in done.stdout
