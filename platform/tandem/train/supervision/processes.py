"""Workers' processes, wherever they are: a look at the Python stack of one that cannot answer, and the end of one; lost nodes.

All is done by a small Ray task on the worker's node.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tandem.train.supervision.health import Heartbeat

INSPECT_TIMEOUT_S = 15.0
KILL_TIMEOUT_S = 30.0
PING_TIMEOUT_S = 30.0


def dump_stack(heartbeat: Heartbeat) -> str:
    """What a worker's process does: its state, and its Python stack where py-spy can read it. Never raises."""
    found = _run_on_nodes(_inspect, [heartbeat], INSPECT_TIMEOUT_S + 15)
    return found[0] if found else f"node {heartbeat.node[:8]} does not answer"


def kill_workers(heartbeats: Iterable[Heartbeat]) -> None:
    """End workers' processes, stopped ones too, and return when they are gone. What is on a node that is gone, is gone."""
    _run_on_nodes(_kill, list(heartbeats), KILL_TIMEOUT_S)


def find_lost_nodes(nodes: Iterable[str]) -> list[str]:
    """Those of these nodes that are gone: Ray says so, or they do not answer. Ray takes a while to notice; this waits for it."""
    stop_request = {
        node: _task_on(node, _ping).remote() for node in set(nodes) - {ray.get_runtime_context().get_node_id()}
    }
    deadline = time.monotonic() + PING_TIMEOUT_S
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        silent = [
            node for node, answer in stop_request.items() if node in alive and not ray.wait([answer], timeout=0)[0]
        ]
        if not silent or time.monotonic() > deadline:
            return sorted({node for node in stop_request if node not in alive} | set(silent))
        time.sleep(0.5)


def _run_on_nodes(doing: Any, heartbeats: list[Heartbeat], timeout_s: float) -> list[Any]:
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    stop_request = [
        _task_on(heartbeat.node, doing).remote(heartbeat.pid, heartbeat.process_started_at)
        for heartbeat in heartbeats
        if heartbeat.node in alive
    ]
    found = []
    for one in stop_request:
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            found.append(ray.get(one, timeout=timeout_s))
    return found


def _task_on(node: str, doing: Any) -> Any:
    # No CPU: the node may be full of the very workers that are looked at.
    return ray.remote(doing).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )


def _ping() -> None:
    """That it is done at all is the answer."""


def _inspect(pid: int, process_started_at: float) -> str:
    process = _find_process(pid, process_started_at)
    if process is None:
        return f"process {pid} is gone"
    state = f"process {pid} is {process.status()}"
    spy = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        # A process that is stopped is not to be stopped, and let go, by us.
        looked = subprocess.run(
            [spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=INSPECT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{state}; its stack cannot be read: {error}"
    if looked.returncode:
        reason = (looked.stderr.strip().splitlines() or ["py-spy gives no reason"])[-1]
        return f"{state}; its stack cannot be read: {reason}"
    return f"{state}\n{training_thread(looked.stdout)}"


def _kill(pid: int, process_started_at: float) -> None:
    process = _find_process(pid, process_started_at)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
        # Its parent, Ray's, may take its time to notice: dead is enough.
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(timeout=10)


def _find_process(pid: int, process_started_at: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - process_started_at) < 1 else None
    except psutil.NoSuchProcess:
        return None


def training_thread(dumped: str) -> str:
    """Of py-spy's threads, the one that trains; all of them if none is known to."""
    threads = dumped.split("\nThread ")
    ours = [text for text in threads if "tandem/train/worker.py" in text]
    return f"Thread {ours[0].strip()}" if ours else dumped.strip()
