"""A Slurm job's app as its node asks it: the key goes to this user's own listener, and never through a proxy."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tandem.errors import ClusterError
from tandem.sdk import slurm_app
from tandem.sdk.slurm_app import check_port_free, is_ready, listener_owners, models


class Gateway(BaseHTTPRequestHandler):
    """Answers as Tandem's gateway does; `authorizations` are those it was sent."""

    authorizations: list[str]
    needs_key = True
    body = b'{"data": [{"id": "tiny"}]}'

    def do_GET(self) -> None:
        """Answer a request."""
        key = self.headers.get("Authorization")
        if key is not None:
            self.authorizations.append(key)
        refused = self.needs_key and key is None and self.path.startswith("/v1/")
        self.send_response(401 if refused else 200)
        self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def gateway() -> type[Gateway]:
    return type("Own", (Gateway,), {"authorizations": []})


@pytest.fixture
def port(gateway: type[Gateway]) -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), gateway)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_taken_port_is_refused_before_the_app_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ClusterError, match=f"Port {port} of 127.0.0.1 cannot be taken"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)


def test_an_app_that_wants_a_key_is_ready_and_names_its_models(port: int, gateway: type[Gateway]) -> None:
    assert listener_owners(port) == {os.geteuid()}
    assert is_ready("127.0.0.1", port) and gateway.authorizations == []
    assert models("127.0.0.1", port, "tdm-x") == ("tiny",) and gateway.authorizations == ["Bearer tdm-x"]


def test_what_answers_without_a_key_is_not_the_app(port: int, gateway: type[Gateway]) -> None:
    gateway.needs_key = False
    assert not is_ready("127.0.0.1", port)


def test_the_listener_of_another_user_is_not_the_app(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "tcp"
    row = f"0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 4242 0 1"
    table.write_text(f"  sl local_address ...\n   {row}\n")
    assert listener_owners(port, [table, tmp_path / "none"]) == {4242} and listener_owners(port + 1, [table]) == set()
    monkeypatch.setattr(slurm_app, "listener_owners", lambda number: {os.geteuid(), 4242})
    assert not is_ready("127.0.0.1", port)


def test_no_proxy_sees_the_key(port: int, gateway: type[Gateway], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert is_ready("127.0.0.1", port) and models("127.0.0.1", port, "tdm-x") == ("tiny",)


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b'{"data": [1]}', b"\xff"])
def test_an_answer_of_another_form_means_not_ready_yet(port: int, gateway: type[Gateway], body: bytes) -> None:
    gateway.body = body
    assert models("127.0.0.1", port, "tdm-x") is None


def test_an_app_that_does_not_answer_is_not_ready_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert not is_ready("127.0.0.1", port) and models("127.0.0.1", port, "tdm-x") is None
