"""Further nodes of a local cluster, to be killed while a benchmark runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from typing import Any

import psutil

NODE_MARK = "TANDEM_BENCH_NODE"
"""Variable that all processes of an added node have; its value names the node."""
RAY_START = """
import sys
from ray._private import ray_constants, services
# On a cluster that listens on loopback alone, Ray lets no node join, and gives it the address of a network interface.
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
sys.argv[0] = "ray"
main()
"""


class Node:
    """A further node of a local cluster, on this machine."""

    def __init__(self, cluster: Any, cpus: int, *, resources: Mapping[str, float] | None = None) -> None:
        self._cluster, self._cpus, self._resources = cluster, cpus, dict(resources or {})
        self._name = uuid.uuid4().hex

    def start(self) -> None:
        """Join the cluster; RuntimeError with Ray's words if it cannot."""
        from tandem.cluster.ports import free_ports
        from tandem.settings import child_environment

        ports = free_ports(2)
        command = [
            sys.executable, "-c", RAY_START, "start", f"--address={self._cluster.address}", "--block",
            "--disable-usage-stats", "--node-ip-address=127.0.0.1", f"--num-cpus={self._cpus}",
            f"--dashboard-agent-listen-port={ports[0]}", f"--metrics-export-port={ports[1]}",
            "--object-store-memory=100000000", f"--resources={json.dumps(self._resources)}",
        ]  # fmt: skip
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                env=child_environment({**self._cluster.environment, NODE_MARK: self._name, "RAY_ADDRESS": None}),
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
            while not any(found.name() == "raylet" for found in self.processes()):
                if process.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(f"The node did not start:\n{output.read()[-2000:]}")
                time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """All processes of the node."""
        from tandem.cluster.marks import marked_processes

        node_processes = []
        for process in marked_processes(self._cluster.mark):
            with contextlib.suppress(psutil.Error):
                if process.environ().get(NODE_MARK) == self._name:
                    node_processes.append(process)
        return node_processes

    def kill(self) -> None:
        """End all its processes at once."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
