"""The HAProxy of Ray Serve with Tandem's edits, in front of one server and without Ray."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.cluster.haproxy import BUFFER_BYTES, serving_environment
from tandem.cluster.ports import free_ports


@contextlib.contextmanager
def haproxy(folder: Path, backend_port: int, **edits: Any) -> Iterator[int]:
    """Run it in front of 127.0.0.1:`backend_port`; the port that it listens on. `edits`: fields of Ray's HAProxyConfig."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    folder.mkdir(parents=True, exist_ok=True)
    port, metrics, stats = free_ports(3)
    variables = serving_environment(folder, [metrics, stats, *free_ports(2)], range(port, port + 1))
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port, keep_alive_timeout_s=300),
        socket_path=variables["RAY_SERVE_HAPROXY_SOCKET_PATH"],
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_enabled=False,
        metrics_port=metrics,
        stats_port=stats,
        bufsize=BUFFER_BYTES,
        nbthread=1,
        retry_on=variables["RAY_SERVE_HAPROXY_RETRY_ON"],
        retries=1,
        has_received_routes=True,
        has_received_servers=True,
        **edits,
    )
    server = ServerConfig(name="gateway", host="127.0.0.1", port=backend_port)
    backend = BackendConfig(
        name="tandem", path_prefix="/", servers=[server], app_name="tandem", http_health_check_path="/health/live"
    )
    file = folder / "haproxy.cfg"
    HAProxyApi(config, {"tandem": backend}, str(file))._generate_config_file_internal()
    process = subprocess.Popen(
        [variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file)],
        stdout=(folder / "haproxy.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        deadline = time.monotonic() + 20
        while not _listens(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "haproxy.log").read_text()
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


def raw_answer(port: int, sent: bytes, *, timeout_s: float = 20.0) -> bytes:
    """All that a server sends to a client that writes these bytes and waits until it is disconnected."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as client:
        client.settimeout(timeout_s)
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        parts = []
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := client.recv(65_536):
                parts.append(part)
        return b"".join(parts)
