"""Operations on worker processes of any node: dump a Python stack, kill a process, find lost nodes.

Each runs as a small Ray task on the worker's node.
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

from tandem.train.supervision.heartbeat import Heartbeat

INSPECT_TIMEOUT_S = 15.0
KILL_TIMEOUT_S = 30.0
PING_TIMEOUT_S = 30.0


def dump_stack(heartbeat: Heartbeat) -> str:
    """The state of a worker's process, and its Python stack if py-spy can read it. Never raises."""
    stacks = _run_on_nodes(_inspect, [heartbeat], INSPECT_TIMEOUT_S + 15)
    return stacks[0] if stacks else f"node {heartbeat.node[:8]} does not answer"


def kill_workers(heartbeats: Iterable[Heartbeat]) -> None:
    """Kill worker processes, suspended ones too, and return when they have ended. Processes of lost nodes have ended."""
    _run_on_nodes(_kill, list(heartbeats), KILL_TIMEOUT_S)


def find_lost_nodes(nodes: Iterable[str]) -> list[str]:
    """The nodes that Ray reports as dead, or that do not answer within PING_TIMEOUT_S: Ray notices a lost node only later."""
    other_nodes = set(nodes) - {ray.get_runtime_context().get_node_id()}
    pings = {node: _task_on(node, _ping).remote() for node in other_nodes}
    deadline = time.monotonic() + PING_TIMEOUT_S
    while True:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        silent_nodes = [node for node, ping in pings.items() if node in alive and not ray.wait([ping], timeout=0)[0]]
        if not silent_nodes or time.monotonic() > deadline:
            return sorted({node for node in pings if node not in alive} | set(silent_nodes))
        time.sleep(0.5)


def _run_on_nodes(function: Any, heartbeats: list[Heartbeat], timeout_s: float) -> list[Any]:
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    tasks = [
        _task_on(heartbeat.node, function).remote(heartbeat.pid, heartbeat.process_started_at)
        for heartbeat in heartbeats
        if heartbeat.node in alive
    ]
    results = []
    for task in tasks:
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            results.append(ray.get(task, timeout=timeout_s))
    return results


def _task_on(node: str, function: Any) -> Any:
    # No CPU: the workers may occupy the whole node.
    return ray.remote(function).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )


def _ping() -> None:
    """Runs if the node lives."""


def _inspect(pid: int, process_started_at: float) -> str:
    process = _find_process(pid, process_started_at)
    if process is None:
        return f"process {pid} is gone"
    state = f"process {pid} is {process.status()}"
    spy = shutil.which("py-spy") or str(Path(sys.executable).with_name("py-spy"))
    try:
        # --nonblocking: py-spy would otherwise suspend the process, and resume one that was suspended before.
        dump = subprocess.run(
            [spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True, timeout=INSPECT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{state}; its stack cannot be read: {error}"
    if dump.returncode:
        reason = (dump.stderr.strip().splitlines() or ["py-spy gives no reason"])[-1]
        return f"{state}; its stack cannot be read: {reason}"
    return f"{state}\n{training_thread(dump.stdout)}"


def _kill(pid: int, process_started_at: float) -> None:
    process = _find_process(pid, process_started_at)
    if process is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
        # A zombie counts as ended: its parent, a Ray process, may reap it late.
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(timeout=10)


def _find_process(pid: int, process_started_at: float) -> psutil.Process | None:
    try:
        process = psutil.Process(pid)
        return process if abs(process.create_time() - process_started_at) < 1 else None
    except psutil.NoSuchProcess:
        return None


def training_thread(output: str) -> str:
    """The thread that trains in the output of py-spy; the whole output if none is recognized."""
    threads = output.split("\nThread ")
    training_threads = [thread for thread in threads if "tandem/train/worker.py" in thread]
    return f"Thread {training_threads[0].strip()}" if training_threads else output.strip()
