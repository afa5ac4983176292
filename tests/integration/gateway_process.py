"""A gateway without engines in a process of its own, whose memory a test can read.

As a program: `python gateway_process.py DATABASE_URL CONFIG_JSON` prints its port and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GatewayProcess:
    """A gateway that runs."""

    url: str
    pid: int

    def memory_bytes(self, name: str) -> int:
        """Of the process: `VmRSS`, its resident memory now, or `VmHWM`, the most that it was."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        raise LookupError(name)

    def reset_peak(self) -> None:
        """Let `VmHWM` begin at `VmRSS` again."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def gateway_process(url: str, config: dict[str, Any], folder: Path) -> Iterator[GatewayProcess]:
    """A gateway on the registry at `url` with fields of GatewayConfig; its TANDEM_HOME is `folder`."""
    process = subprocess.Popen(
        [sys.executable, __file__, url, json.dumps(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TANDEM_HOME": str(folder)},
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        port = int(process.stdout.readline())
        yield GatewayProcess(url=f"http://127.0.0.1:{port}", pid=process.pid)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


async def serve(url: str, config: dict[str, Any]) -> None:
    """Serve until the standard input ends."""
    import uvicorn

    from tandem.config import GatewayConfig, from_dict
    from tandem.gateway.app import create_app
    from tandem.registry import Registry
    from tandem.routing.records import Snapshot

    async def watch(version: int) -> Snapshot:
        if version:
            await asyncio.sleep(3600)
        return Snapshot(version=1, replicas=())

    app = create_app(models=[], watch=watch, registry=Registry(url), config=from_dict(GatewayConfig, config))
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error", proxy_headers=False))

    def stop() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=stop, daemon=True).start()
    print(sock.getsockname()[1], flush=True)
    await server.serve(sockets=[sock])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], json.loads(sys.argv[2])))
