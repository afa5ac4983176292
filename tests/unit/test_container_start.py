"""The container's entry point and health check, as processes."""

from __future__ import annotations

import ast
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

DOCKER = Path(__file__).parents[2] / "deploy" / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Runs the entry point with a `tandem` that writes down how it is called, and has the API keys that it is told to have."""

    def run(*arguments: str, keys: str = "[]", **variables: str) -> tuple[int, str, list[str]]:
        folder, log = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        log.write_text("")
        script = f'printf \'%s|%s|%s\\n\' "$*" "${{TANDEM_DATABASE_URL:-}}" "${{RAY_ADDRESS:-}}" >> {log}\n'
        script += f'[ "$1 $2" = "keys ls" ] && echo \'{keys}\'\nexit 0\n'
        (folder / "tandem").write_text(f"#!/bin/sh\n{script}")
        (folder / "tandem").chmod(0o755)
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "HOME": str(home),
            "TANDEM_HOME": str(tmp_path / "data"),
            "TANDEM_RUNTIME_DIR": str(tmp_path / "run"),
            **variables,
        }
        done = subprocess.run(
            [str(ENTRYPOINT), *arguments], env=environment, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stderr, log.read_text().splitlines()

    return run


KEYS = '[{"id": "key_1"}]'


def test_the_container_starts_a_node_and_the_app(start: Any, tmp_path: Path) -> None:
    status, said, calls = start("start", "my-model", "--set", "gateway.replicas=2", keys=KEYS)
    assert status == 0, said
    assert [call.split("|")[0].split()[:2] for call in calls] == [["keys", "ls"], ["node", "start"], ["serve", "up"]]
    node, app = calls[1].split("|")[0], calls[2].split("|")
    assert "--head" in node and re.search(r"--object-store-memory=\d{6,}", node)
    assert app[0] == "serve up --host 0.0.0.0 my-model --set gateway.replicas=2" and app[2] == "auto"
    assert (tmp_path / "data").is_dir()


def test_a_database_is_brought_up_to_date_first_with_the_url_of_a_file(start: Any, tmp_path: Path) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://tandem:p@postgres:5432/tandem\n")
    status, said, calls = start("start", keys=KEYS, TANDEM_DATABASE_URL_FILE=str(secret))
    assert status == 0, said
    assert calls[0].split("|")[:2] == ["db upgrade", "postgresql://tandem:p@postgres:5432/tandem"]


def test_other_arguments_are_commands_of_tandem(start: Any, tmp_path: Path) -> None:
    assert start("keys", "create", "first")[2] == ["keys create first||"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "node.json").write_text("{}")
    assert start("serve", "status")[2] == ["serve status||auto"]


def test_without_a_key_nothing_is_served(start: Any) -> None:
    status, said, calls = start("start")
    assert status == 2 and "There is no API key yet" in said and "keys create first" in said
    assert [call.split("|")[0] for call in calls] == ["keys ls --json"]


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot read"), ("", "is empty"), ("postgresql://<user>@h/d", "placeholder")]
)
def test_a_secret_that_is_missing_empty_or_not_filled_in_is_refused(
    start: Any, tmp_path: Path, content: str | None, says: str
) -> None:
    secret = tmp_path / "url"
    if content is not None:
        secret.write_text(content)
    status, said, calls = start("start", keys=KEYS, TANDEM_DATABASE_URL_FILE=str(secret))
    assert (status, calls) == (2, []) and says in said


def test_a_home_that_cannot_be_written_is_refused(start: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, said, calls = start("start", keys=KEYS, TANDEM_HOME=str(tmp_path / "file" / "data"))
    assert (status, calls) == (2, []) and "cannot write" in said and "10001" in said


def test_the_real_command_refuses_to_start_without_a_key(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TANDEM_HOME": str(tmp_path / "data")}
    (tmp_path / "tandem").write_text(f'#!/bin/sh\nexec {sys.executable} -m tandem "$@"\n')
    (tmp_path / "tandem").chmod(0o755)
    done = subprocess.run([str(ENTRYPOINT)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "There is no API key yet" in done.stderr, done.stderr
    assert (tmp_path / "data" / "tandem.db").is_file()


class Health(http.server.BaseHTTPRequestHandler):
    """Answers that the app is ready, or with the status that it is told."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health/ready" else 404)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("answer", "status"), [(200, 0), (503, 1), (None, 1)])
def test_the_health_check_asks_the_gateway(answer: int | None, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    monkeypatch.setattr(Health, "status", answer or 200)
    port = str(server.server_port)
    if answer is None:
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    done = subprocess.run(
        [sys.executable, str(DOCKER / "health.py")], env={"TANDEM_PORT": port}, capture_output=True, timeout=30
    )
    assert done.returncode == status
    if answer is not None:
        server.shutdown()
        server.server_close()


def test_the_health_check_needs_the_standard_library_alone() -> None:
    tree = ast.parse((DOCKER / "health.py").read_text())
    names = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    assert names <= sys.stdlib_module_names
