"""Facts about this machine: CPU, memory, ports, GPUs, installed packages. Read-only; imports no heavy library."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class PortHolder:
    """The process that listens on a port; unknown where it belongs to another user."""

    pid: int | None = None
    name: str = "a process of another user"

    def __str__(self) -> str:
        """`python (pid 12)`."""
        return f"{self.name} (pid {self.pid})" if self.pid else self.name


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The CPU's features by the kernel's names; empty where the kernel does not list them."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, separator, value = line.partition(":")
        if separator and name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def usable_cores(cgroup: Path = CGROUP) -> float:
    """Cores that this process may use: its affinity, lowered by a container's quota."""
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return cores


def free_memory(cgroup: Path = CGROUP) -> int:
    """Bytes that can still be used, lowered by a container's limit."""
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        available = min(available, max(0, int(limit) - int(used)))
    return available


def port_holder(port: int) -> PortHolder | None:
    """The process that listens on a TCP port of this machine, None if it is free."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return _holder(connection.pid)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return PortHolder()
    return None


def gpus() -> list[str]:
    """`NVIDIA H100 80GB HBM3, 81559 MiB, driver 570.1` for each GPU; empty without a working nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines() if line.strip()]
    return [", ".join([*row[:-1], f"driver {row[-1]}"]) for row in rows]


def installed(name: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet_requirements(extra: str | None = None) -> list[str]:
    """Unmet requirements of Tandem or of an extra: `ray 2.59 (needs >=2.60)`, `peft (missing)`."""
    problems = []
    for line in importlib.metadata.requires("tandem") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        # With an extra asked for, those without a marker were checked already.
        if extra and not requirement.marker:
            continue
        version = installed(requirement.name)
        if version is None:
            problems.append(f"{requirement.name} (missing)")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    return problems


def _holder(pid: int | None) -> PortHolder:
    if pid is None:
        return PortHolder()
    try:
        return PortHolder(pid=pid, name=psutil.Process(pid).name())
    except psutil.Error:
        return PortHolder(pid=pid, name="a process")
