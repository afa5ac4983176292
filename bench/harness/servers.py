"""Servers under test: each stack runs as a child with all its processes, and is stopped (SIGSTOP) while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
"""Programs run from the repository's root: `python -m bench...`."""
MARK = "TANDEM_BENCH_STACK"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
NAMES = {
    "bare": "vLLM server, bare",
    "bare-one": "the same, one process",
    "tandem": "Tandem",
    "ray": "Ray Serve LLM, default",
    "ray-direct": "Ray Serve LLM, direct streaming",
}
ECHOES = {"echo-1": "Tandem, 1 gateway", "echo-2": "Tandem, 2 gateways"}
"""Stacks of other benchmarks."""
KEYS: dict[int, str] = {}
"""API keys of the stacks that take none but requests with one, by their ports."""


@contextlib.contextmanager
def stack(name: str, folder: Path) -> Iterator[int]:
    """One stack, up on a port of its own; ends with all its processes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    variables = dict(os.environ, **ENVIRONMENT, **{MARK: name, "TANDEM_HOME": str(folder / f"home-{name}")})
    if name == "ray-direct":
        variables |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}
        files = {
            "CONFIG_FILE_LOC": "h.cfg",
            "SOCKET_PATH": "h.sock",
            "SERVER_STATE_BASE": "",
            "SERVER_STATE_FILE": "state",
        }
        variables |= {f"RAY_SERVE_HAPROXY_{key}": str(folder / "h" / file) for key, file in files.items()}
        variables |= {
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        }
    log = (folder / f"{name}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.serving.stacks", name, str(folder / "model"), str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=variables,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"KEY "):
                KEYS[port] = line.split()[1].decode()
            if line.strip() == b"READY":
                break
        else:
            raise RuntimeError(
                f"{(NAMES | ECHOES).get(name, name)} did not start:\n{(folder / f'{name}.log').read_text()[-9000:]}"
            )
        yield port
    finally:
        freeze(name, False)
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        for member in members(name):
            with contextlib.suppress(psutil.Error):
                member.kill()


def members(name: str) -> list[psutil.Process]:
    """Every process of a stack: they inherit its mark."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == name and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def freeze(name: str, stop: bool) -> None:
    """Suspend all processes of a stack (SIGSTOP), or resume them."""
    for process in members(name):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGSTOP if stop else signal.SIGCONT)


@contextlib.contextmanager
def resumed_stack(name: str, port: int) -> Iterator[None]:
    """A stack that runs, warm, for the length of a block."""
    freeze(name, False)
    try:
        # Its timers all fire now, and its proxy may open its listener anew; it is measured when it answers quickly again.
        for left in reversed(range(20)):
            time.sleep(0.5)
            try:
                figures = drive(port, 1, 8)
            except RuntimeError:
                if not left:
                    raise
                time.sleep(2)
                continue
            if not figures["failed"] and figures["seconds"] < 5:
                break
        time.sleep(1.0)
        drive(port, 4, 32)
        yield
    finally:
        freeze(name, True)


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def drive(
    port: int, streams: int, tokens: int, *, whole: bool = False, requests: int | None = None, prompt: str = ""
) -> dict[str, Any]:
    """One run of the load generator, in a process of its own; each stream sends `requests`, one after the other."""
    requests = requests or (min(16, max(4, 128 // streams)) if tokens > 32 else 1)
    command = [sys.executable, "-m", "bench.harness.load", f"http://127.0.0.1:{port}", "--model", "bench"]
    command += ["--streams", str(streams), "--tokens", str(tokens), "--requests", str(requests)]
    command += ["--whole"] if whole else []
    command += ["--prompt", prompt] if prompt else []
    command += ["--key", KEYS[port]] if port in KEYS else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout))
