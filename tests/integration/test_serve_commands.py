"""The app by Ray Serve's own commands: `serve run` and `serve deploy`, on a cluster that somebody else started."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import yaml
from commands import REPOSITORY, cluster_record, run, started
from serve_fixtures import free_port, write_model

from tandem.registry import Registry

OWNER = "import time; from tandem.cluster.local import LocalCluster; LocalCluster.start(num_cpus=8); time.sleep(600)"
SERVE = str(Path(sys.executable).with_name("serve"))
READY_S = 180.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one registered model."""
    folder = tmp_path_factory.mktemp("home")
    Registry(f"sqlite:///{folder}/tandem.db").register_model("tiny", write_model(folder / "tiny"))
    return folder


def wait_until_ready(port: int, name: str) -> None:
    """Until the app says that every model has a replica."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
            if answer.status_code == 200:
                assert answer.json()["ready_replicas"] == {name: 1}
                return
        time.sleep(0.5)
    raise AssertionError(f"the app was not ready within {READY_S} s")


def ask(port: int, name: str) -> int:
    """The number of tokens of a short completion."""
    body = {"model": name, "prompt": "the cat sat", "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


@pytest.mark.slow  # servers of its own, started and stopped by commands
def test_serve_run_and_serve_deploy_bring_up_the_app(home: Path, tmp_path: Path) -> None:
    with started([sys.executable, "-c", OWNER], home=home, log=tmp_path / "cluster.log") as owner:
        owner.wait_for(lambda: cluster_record(home).exists())
        cluster = json.loads(cluster_record(home).read_text())
        environment = cluster["environment"]

        # As the page says, without a config: the newest registered model, on vLLM. Serve's own port is 8000.
        described = yaml.safe_load((REPOSITORY / "serve_apps" / "openai.yaml").read_text())
        assert described["http_options"]["port"] == 8000
        described["http_options"]["port"] = port = free_port()
        (tmp_path / "openai.yaml").write_text(yaml.safe_dump(described))
        deployed = run(
            [SERVE, "deploy", "--address", cluster["dashboard_url"], str(tmp_path / "openai.yaml")],
            home=home,
            **environment,
        )
        assert deployed.returncode == 0, deployed.stdout
        wait_until_ready(port, "tiny")
        assert ask(port, "tiny") == 4

        # `serve run` takes its arguments from the command line, goes on with the port there is, and ends its app with Ctrl-C.
        command = [SERVE, "run", "--address", cluster["address"], "--name", "tandem", "serve_apps.openai:app"]
        (tmp_path / "echo.yaml").write_text(
            yaml.safe_dump({"models": [{"model": "echo", "name": "parrot", "engine": "echo"}]})
        )
        with started(
            [*command, f"config={tmp_path / 'echo.yaml'}"], home=home, log=tmp_path / "run.log", **environment
        ) as running:
            running.wait_for(lambda: "parrot" in health(port), timeout_s=READY_S)
            wait_until_ready(port, "parrot")
            assert ask(port, "parrot") > 0
            # The app before it drains for half a minute, and `serve run` waits for that.
            running.wait_for("is ready at", timeout_s=READY_S)
            for _ in range(5):  # a Ctrl-C may be lost in Ray, and is pressed again
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running.interrupt(signal.SIGINT, timeout_s=20)
                    break
            assert running.process.poll() is not None


def health(port: int) -> str:
    """What the app says of its models, if it says anything."""
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).text
    return ""
