"""`tandem quickstart` is the whole main job, in one command that leaves nothing behind."""

from __future__ import annotations

import re
import signal
import socket
import sys
from pathlib import Path

import pytest
from commands import cluster_mark, cluster_record, gone, started, tandem

from tandem.cluster.ports import free_ports


def test_a_busy_port_is_refused_before_any_work(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        refused = tandem("quickstart", "--exit", "--port", str(port), home=tmp_path)
    assert refused.returncode == 1
    assert f"Port {port} is taken by " in refused.stdout
    assert "--port" in refused.stdout
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "stage",
    [
        "Starting workers",
        pytest.param("Pretrain", marks=pytest.mark.slow),  # it waits for the dataset
        pytest.param("Serve both", marks=pytest.mark.slow),  # it waits for vLLM
    ],
)
def test_ctrl_c_leaves_nothing_running(tmp_path: Path, stage: str, quickstart_home: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    if stage == "Serve both":
        home = quickstart_home  # trained already: it goes straight to serving
    command = [sys.executable, "-m", "tandem", "quickstart", "--port", str(free_ports(1)[0]), "--set", "steps=4"]
    with started(command, home=home, log=tmp_path / "log", PYTHONUNBUFFERED="1") as running:
        running.wait_for("Pretrain" if stage == "Starting workers" else stage)
        if stage != "Pretrain":
            running.wait_for(lambda: cluster_record(home).exists())
        mark = cluster_mark(home) if cluster_record(home).exists() else ""
        status = running.interrupt(signal.SIGINT)
    assert status == 130, running.text()
    assert not mark or gone(mark) == []
    assert not cluster_record(home).exists()


@pytest.fixture(scope="module")
def quickstart_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which a short quickstart has run; its output is in `output.txt`."""
    home = tmp_path_factory.mktemp("quickstart")
    done = tandem("quickstart", "--exit", "--port", str(free_ports(1)[0]), "--set", "steps=4", home=home, timeout_s=600)
    (home / "output.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout
    return home


def test_it_trains_serves_and_asks_and_says_what_next(quickstart_home: Path) -> None:
    text = (quickstart_home / "output.txt").read_text()
    asked = [int(n) for n in re.findall(r"answers \d+ of (\d+) questions word for word", text)]
    assert len(asked) == 2
    assert min(asked) >= 64
    assert all(command in text for command in ("tandem chat --model", "curl http://127.0.0.1:", "tandem models ls"))
    assert not cluster_record(quickstart_home).exists()
    assert len(list(quickstart_home.glob("jobs/*/loss.png"))) == 2


@pytest.mark.slow  # the whole quickstart: eight minutes
@pytest.mark.timeout(1500)
def test_the_adapter_knows_the_answers_and_the_base_does_not(tmp_path: Path) -> None:
    done = tandem("quickstart", "--exit", "--port", str(free_ports(1)[0]), home=tmp_path, timeout_s=1200)
    assert done.returncode == 0, done.stdout
    (base, asked), (adapter, _) = [
        (int(right), int(asked)) for right, asked in re.findall(r"answers (\d+) of (\d+) questions", done.stdout)
    ]
    assert asked >= 64
    assert adapter >= 0.9 * asked, done.stdout
    assert base <= 0.05 * asked, done.stdout
    again = tandem("quickstart", "--exit", "--port", str(free_ports(1)[0]), home=tmp_path, timeout_s=300)
    assert again.returncode == 0, again.stdout
    assert "is there" in again.stdout
    assert "step " not in again.stdout, "the second run must not train"
