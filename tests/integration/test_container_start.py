"""The container's entry point with the real command: a node, an app with the echo engine, its health check and its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.cluster.node import HAPROXY_PORTS
from tandem.cluster.ports import free_ports
from tandem.settings import child_environment

pytestmark = pytest.mark.slow  # a node of its own

DOCKER = Path(__file__).parents[2] / "deploy" / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
ECHO = "models: [{model: echo, name: echo, engine: echo}]\n"
PORTS = (6379, 8080, 8265, *HAPROXY_PORTS)
"""Fixed ones, of the node that runs in a container."""
START_S = 240.0


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


@pytest.fixture
def container() -> Iterator[dict[str, str]]:
    """The environment of a container, with its folders on this machine; its node ends with the test."""
    if taken := [port for port in PORTS if not is_free(port)]:
        pytest.skip(f"ports are taken on this machine: {taken}")
    folder = Path(tempfile.mkdtemp(prefix="tc-", dir="/tmp"))
    for name in ("bin", "home", "data", "run"):
        (folder / name).mkdir(mode=0o700)
    command = folder / "bin" / "tandem"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m tandem "$@"\n')
    command.chmod(0o755)
    (folder / "echo.yaml").write_text(ECHO)
    environment = child_environment(
        {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "TANDEM_HOME": str(folder / "data"),
            "TANDEM_RUNTIME_DIR": str(folder / "run"),
            "TANDEM_PORT": str(free_ports(1)[0]),
            **dict.fromkeys(("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN", "TANDEM_DATABASE_URL"), None),
        }
    )
    try:
        yield {**environment, "FOLDER": str(folder)}
    finally:
        run(environment, "node", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ENTRYPOINT, *arguments], env=environment, capture_output=True, text=True, timeout=120)


def is_healthy(environment: dict[str, str]) -> bool:
    check = subprocess.run([sys.executable, DOCKER / "health.py"], env=environment, capture_output=True, timeout=30)
    return check.returncode == 0


def test_the_container_serves_with_a_key_until_it_is_told_to_end(container: dict[str, str]) -> None:
    made = run(container, "keys", "create", "first", "--json")
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)["secret"]
    log = Path(container["FOLDER"]) / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [ENTRYPOINT, "start", "--config", f"{container['FOLDER']}/echo.yaml"],
            env=container, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_S
        while not is_healthy(container):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        assert ask(container, key) == 200
        assert ask(container, "wrong") == 401
        status = run(container, "serve", "status")
        assert status.returncode == 0 and "echo" in status.stdout, status.stderr
        assert "ray_" in exported()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        assert not is_healthy(container)
    finally:
        server.kill()
        server.wait()


def ask(environment: dict[str, str], key: str) -> int:
    """Status of a chat request to the app."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{environment['TANDEM_PORT']}/v1/chat/completions",
        data=json.dumps({"model": "echo", "messages": [{"role": "user", "content": "hello"}]}).encode(),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def exported() -> str:
    """Metrics of the node, as Prometheus asks for them from another container."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # of UDP: nothing is sent
        address = probe.getsockname()[0]
    with urllib.request.urlopen(f"http://{address}:8080/metrics", timeout=30) as answer:
        return str(answer.read().decode())
