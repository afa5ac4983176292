"""HAProxy as Ray starts it, with Tandem's script in its place, and curl as its client; no Ray."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from tandem.cluster.haproxy import write_script
from tandem.cluster.ports import free_ports


class Listener:
    """HAProxy as Ray starts it, in front of a server on the port `backend`, which answers 200 at `health`."""

    def __init__(self, folder: Path, backend: int = 0, health: str = "/-/healthz") -> None:
        self.backend, self.health = backend, health
        self.folder = folder / "n"
        self.folder.mkdir()
        self.script = write_script(self.folder)
        (self.port,) = free_ports(1)
        self.socket = self.folder / "admin.sock"
        self.config = self.folder / "haproxy.cfg"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start it, or with `arguments` another one in its place."""
        self._api()._generate_config_file_internal()
        with (self.folder / f"log-{len(self.processes)}").open("wb") as log:
            process = subprocess.Popen(
                [str(self.script), "-db", "-f", str(self.config), *arguments], stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def _api(self) -> HAProxyApi:
        ports = free_ports(2)
        config = HAProxyConfig(
            socket_path=str(self.socket),
            metrics_port=ports[0],
            stats_port=ports[1],
            server_state_base=str(self.folder),
            server_state_file=str(self.folder / "state"),
            http_options=HTTPOptions(host="127.0.0.1", port=self.port),
            timeout_client_s=60,
        )
        gateway = ServerConfig(name="s", host="127.0.0.1", port=self.backend)
        server = BackendConfig(
            name="app",
            path_prefix="/",
            http_health_check_path=self.health,
            servers=[gateway],
        )
        return HAProxyApi(config, {"app": server}, config_file_path=str(self.config))

    def reload(self) -> None:
        """Start a new process that takes the sockets over, as Ray does when gateways change."""
        old = self.processes[-1]
        self.start("-sf", str(old.pid), "-x", str(self.socket))

    async def subject(self) -> str:
        """Of the certificate that a new connection gets."""
        deadline = time.monotonic() + 20
        while True:
            try:
                pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", self.port), timeout=5)
                name = x509.load_pem_x509_certificate(pem.encode()).subject
                return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
            except OSError:
                assert time.monotonic() < deadline and self.processes[-1].poll() is None, self.log()
                await asyncio.sleep(0.05)

    async def until_subject(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while (found := await self.subject()) != name:
            assert time.monotonic() < deadline, (found, self.log())
            await asyncio.sleep(0.1)

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@contextmanager
def listening(folder: Path, backend: int = 0, health: str = "/-/healthz") -> Iterator[Listener]:
    """A listener that is stopped at the end of a block."""
    listener = Listener(folder, backend, health)
    try:
        yield listener
    finally:
        listener.stop()


async def curl(listener: Listener, path: str, *options: str) -> tuple[str, str]:
    """The body, and the version and status of an answer."""
    process = await asyncio.create_subprocess_exec(
        "curl", "-sSk", "--max-time", "60", "-w", "\n%{http_version} %{http_code}", *options,
        f"https://127.0.0.1:{listener.port}{path}", stdout=subprocess.PIPE,
    )  # fmt: skip
    out, _ = await process.communicate()
    body, _, told = out.decode().rpartition("\n")
    return body, told
