"""What is changed in HAProxy's configuration, on Ray's own template of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import socketserver
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from real_haproxy import haproxy, raw_answer

from tandem.cluster.haproxy import BUFFER_BYTES, serving_environment, write_script
from tandem.cluster.ports import free_ports


@pytest.fixture
def edited(tmp_path: Path) -> str:
    """The template as HAProxy would read it, for an app that listens on every interface."""
    write_script(tmp_path)
    config = tmp_path / "haproxy.cfg"
    # As Ray fills it in for the host 0.0.0.0.
    config.write_text(HAPROXY_CONFIG_TEMPLATE.replace("{{ config.frontend_host }}", "*"))
    subprocess.run(["sed", "-i", "-f", str(tmp_path / "haproxy.sed"), str(config)], check=True)
    return config.read_text()


def test_the_admin_socket_is_for_its_owner_alone(edited: str) -> None:
    (line,) = re.findall(r"^ *stats socket .*", edited, re.MULTILINE)
    assert " mode 600 level admin" in line


def test_statistics_and_metrics_are_on_loopback_and_the_public_listener_is_where_it_was(edited: str) -> None:
    binds = re.findall(r"^ *bind (\S*?):\{\{ config\.(\w+)_port \}\}", edited, re.MULTILINE)
    assert {port: host for host, port in binds} == {
        "metrics": "127.0.0.1",
        "frontend": "*",
        "stats": "127.0.0.1",
    } | {port: host for host, port in binds if port == "grpc_frontend"}


def test_connections_of_an_address_and_the_time_of_a_request_are_limited(edited: str) -> None:
    assert re.findall(r"^ *timeout http-request (\d+)s$", edited, re.MULTILINE) == ["10"]
    listener = edited.split("frontend http_frontend")[1].split("http-request", 1)[0]
    assert "tcp-request connection reject if { sc0_conn_cur gt 2048 }" in listener
    # Of the public listener alone.
    assert edited.count("stick-table") == 1


def test_the_addresses_of_an_ipv6_network_share_one_limit(edited: str, tmp_path: Path) -> None:
    rules = re.findall(r"^ *(?:stick-table|tcp-request connection) .*$", edited, re.MULTILINE)
    (port,) = free_ports(1)
    # Rules of sessions come after the header that says where a connection is from.
    limit = "\n".join(rules).replace("tcp-request connection", "tcp-request session").replace("gt 2048", "gt 1")
    config = tmp_path / "limit.cfg"
    config.write_text(
        "defaults\n mode http\n timeout client 30s\n timeout connect 5s\n timeout server 5s\n"
        f"frontend f\n bind 127.0.0.1:{port} accept-proxy\n{limit}\n http-request return status 200\n"
    )
    binary = serving_environment(tmp_path, free_ports(4), range(port, port + 1))["RAY_SERVE_HAPROXY_BINARY_PATH"]
    process = subprocess.Popen([binary, "-db", "-f", str(config)])
    held: list[socket.socket] = []

    def taken(source: str) -> bool:
        """Whether a request is answered on one more connection from there, which stays."""
        client = socket.create_connection(("127.0.0.1", port), 20)
        held.append(client)
        family = "TCP6" if ":" in source else "TCP4"
        with contextlib.suppress(ConnectionError):
            client.sendall(f"PROXY {family} {source} {source} 1000 80\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n".encode())
            return client.recv(12) == b"HTTP/1.1 200"
        return False

    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                assert taken("2001:db8:0:1::1")
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not taken("2001:db8:0:1:ffff::2") and taken("2001:db8:0:2::1")
        assert taken("10.0.0.1") and taken("10.0.0.2") and not taken("10.0.0.1")
    finally:
        for each in held:
            each.close()
        process.kill()
        process.wait()


def test_the_list_of_apps_is_not_told(edited: str) -> None:
    assert re.findall(r"^ *http-request return status (\S+) if routes$", edited, re.MULTILINE) == ["404"]


def test_the_script_is_for_its_owner_alone_and_sockets_have_short_paths(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    variables = serving_environment(folder, [1, 2, 3, 4], range(5, 6))
    assert stat.S_IMODE(Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"]).stat().st_mode) == 0o700
    files = [name for name in variables if name.endswith(("_LOC", "_SOCKET_PATH", "_STATE_BASE", "_STATE_FILE"))]
    assert len(files) == 5 and all(variables[name].startswith(str(folder)) for name in files)
    # In /tmp/tandem-XXXXXXXX, with the folder of a node's id that Ray adds, and the largest process id of Linux.
    admin = Path(variables["RAY_SERVE_HAPROXY_SOCKET_PATH"]).relative_to(folder)
    longest = Path("/tmp/tandem-XXXXXXXX") / admin.parent / ("n" * 56) / f"{admin.name}.{2**22}.tmp"
    assert len(str(longest)) <= 107


@pytest.mark.parametrize("gone", [False, True])
def test_a_child_of_a_cluster_takes_the_packages_haproxy(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    inherited = write_script(first)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(inherited))
    if gone:
        inherited.unlink()
    script = write_script(second).read_text()
    assert str(first) not in script
    assert os.access(script.rsplit('exec "')[-1].split('"')[0], os.X_OK)


def test_a_haproxy_of_the_users_own_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "haproxy"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o700)
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(own))
    assert f'exec "{own}"' in write_script(tmp_path).read_text()


def test_pages_of_its_own_are_in_the_apis_shape(edited: str, tmp_path: Path) -> None:
    files = dict(re.findall(r"^ *errorfile (\d+) (\S+)$", edited, re.MULTILINE))
    assert {"400", "404", "408", "502", "503", "504"} == set(files)
    for status, file in files.items():
        head, _, body = Path(file).read_bytes().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 5" if status > "5" else f"HTTP/1.1 {status} ".encode())
        assert f"Content-Length: {len(body)}".encode() in head and b"application/json" in head
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert "Ping http" not in edited


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, list[bytes]]]:
    """The port of a real HAProxy, and the heads of the requests that reach the server behind it."""
    heads: list[bytes] = []

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while head := b"".join(iter(self.rfile.readline, b"\r\n")):
                if b"/health/" not in head:
                    heads.append(head)
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                self.rfile.read(int(length[1]) if length else 0)
                if b"transfer-encoding: chunked" in head.lower():
                    # Left unread, its end would be answered as a request, and HAProxy take that for the answer to the next one.
                    b"".join(iter(self.rfile.readline, b"\r\n"))
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address = True, True

    with Server(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with haproxy(tmp_path_factory.mktemp("h"), server.server_address[1]) as port:
            while b" 200 " not in raw_answer(port, GET + b"\r\n"):
                time.sleep(0.1)
            yield port, heads
        server.shutdown()


GET = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
POST = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
REFUSED = {
    "two lengths": POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}x",
    "an unknown coding": POST + b"transfer-encoding: xchunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    "a header above a buffer": GET + b"x: " + b"a" * BUFFER_BYTES + b"\r\n\r\n",
    "a URL above a buffer": b"GET /" + b"a" * BUFFER_BYTES + b" HTTP/1.1\r\nhost: a\r\n\r\n",
    "more than 100 headers": GET + b"".join(b"x%d: a\r\n" % number for number in range(110)) + b"\r\n",
    "a space in a name": POST + b"content-length : 5\r\n\r\n",
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED.keys())
def test_heads_that_are_too_large_or_ambiguous_reach_no_gateway(running: tuple[int, list[bytes]], sent: bytes) -> None:
    port, heads = running
    heads.clear()
    answer = raw_answer(port, sent)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1 and not heads


def test_of_a_length_and_chunks_one_reaches_the_gateway(running: tuple[int, list[bytes]]) -> None:
    port, heads = running
    heads.clear()
    hidden = b"GET /hidden HTTP/1.1\r\nhost: a\r\n\r\n"
    raw_answer(port, POST + b"content-length: 40\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + hidden)
    assert not [head for head in heads if b"/hidden" in head]
    assert not [head for head in heads if b"content-length: 40" in head.lower()]


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        (b"x-request-id", b"req-1", True),
        (b"x-request-id", b"a" * 128, True),
        (b"x-request-id", b"a" * 129, False),
        (b"x-request-id", b"a\xff", False),
        (b"x-request-id", b"a b", False),
        (b"x-request-id", b"one\r\nx-request-id: two", False),
        (b"x-session-id", b"chat 1", True),
        (b"x-session-id", b"a\xff", False),
        (b"serve_multiplexed_model_id", b"a", False),
        (b"x-request-timeout-seconds", b"1", False),
    ],
)
def test_ids_that_serve_fails_on_and_its_own_headers_reach_no_gateway(
    running: tuple[int, list[bytes]], name: bytes, value: bytes, kept: bool
) -> None:
    port, heads = running
    heads.clear()
    assert b" 200 " in raw_answer(port, GET + name + b": " + value + b"\r\n\r\n")
    (head,) = [each for each in heads if b"GET / " in each]
    assert (name + b":" in head.lower()) == kept


def test_a_body_that_does_not_come_is_408_as_json(running: tuple[int, list[bytes]]) -> None:
    port, heads = running
    heads.clear()
    answer = raw_answer(port, POST + b"content-length: 10\r\n\r\n{")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and json.loads(body)["error"]["code"] == "upload_timeout" and not heads
