"""The health of the machine on which this runs: executes the tools that are there, and hands their output to the parsers."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

from tandem.cluster.health.amd import COMMAND as ROCM
from tandem.cluster.health.amd import check_cards, parse_rocm
from tandem.cluster.health.host import check_disks, check_memory
from tandem.cluster.health.nvidia import Gpu, check_gpus, check_nvlink, parse_nvlink, parse_query
from tandem.cluster.health.rdma import Port, check_ports, check_system, read_ports
from tandem.cluster.health.report import Finding, NodeReport
from tandem.cluster.health.serving import check_serving
from tandem.cluster.health.transport import Devices, check_settings, transport_settings
from tandem.cluster.health.xid import check_xids, parse_kernel_log
from tandem.settings import child_environment, settings

COMMAND_TIMEOUT_S = 20.0
"""Seconds that one tool may take. nvidia-smi hangs where a GPU does."""
KERNEL_LOGS: tuple[Sequence[str], ...] = (
    ("dmesg", "--time-format", "iso"),
    ("journalctl", "-k", "-b", "-o", "short-iso", "--no-pager"),
)
"""The first that may be read. A container or an unprivileged user often may read neither."""
XID_AGE = timedelta(hours=24)
"""Age up to which an Xid counts: the log since boot also tells of GPUs that were reset or replaced."""


class ToolError(Exception):
    """A tool that is installed and does not work."""


def collect(node_id: str, address: str, uncordoned_at: datetime | None = None) -> NodeReport:
    """The report of this machine. A reader that fails is a finding, so there is always a whole report.

    `uncordoned_at`: when the node was last let in again; Xids from before do not count.
    """
    environment = child_environment()
    facts: dict[str, str] = {}
    findings: list[Finding] = []
    gpus: list[Gpu] = []
    ports = read_ports()
    readers: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
        ("gpu_driver", lambda: _nvidia(facts, gpus)),
        ("gpu_xid", lambda: _xids(uncordoned_at)),
        ("nvlink", lambda: _nvlink(gpus)),
        ("gpu_driver", lambda: _amd(facts)),
        ("rdma", lambda: [*check_ports(ports), *check_system(ports, has_gpus="GPU" in facts)]),
        ("network_settings", lambda: check_settings(environment, _devices(ports))),
        ("disk", lambda: check_disks(_folders(environment))),
        ("memory", check_memory),
        ("serving", lambda: check_serving(environment)),
    )
    for kind, read in readers:
        try:
            findings += read()
        except ToolError as error:
            fix = "Run the command on that node; reboot it if the command hangs or the GPU is lost."
            findings.append(Finding(kind=kind, severity="bad", says=str(error), fix=fix))
        except Exception as error:  # noqa: BLE001 - the other readers still report
            fix = "Report this with the output of `tandem doctor --cluster --json`."
            findings.append(Finding(kind=kind, severity="warning", says=f"could not be read: {error!r}", fix=fix))
    facts.update(transport_settings(environment))
    return NodeReport(
        node_id=node_id, address=address, host=socket.gethostname(), findings=tuple(findings), facts=facts
    )


def clock() -> float:
    """This machine's time, in seconds since 1970."""
    return time.time()


def _has_nvidia_devices() -> bool:
    # The device files stay where the driver has lost its GPUs or its tool is missing.
    return Path("/proc/driver/nvidia/gpus").is_dir() and any(Path("/proc/driver/nvidia/gpus").iterdir())


def _nvidia(facts: dict[str, str], gpus: list[Gpu]) -> list[Finding]:
    if shutil.which("nvidia-smi") is None:
        if _has_nvidia_devices():
            raise ToolError("this machine has NVIDIA GPUs and no nvidia-smi")
        return []
    report = parse_query(_run("nvidia-smi", "-q", "-x"))
    facts["driver"] = report.driver
    if report.gpus:
        facts["GPU"] = f"{len(report.gpus)} x {report.gpus[0].name}"
    gpus += report.gpus
    return check_gpus(report)


def _nvlink(gpus: Sequence[Gpu]) -> list[Finding]:
    if len(gpus) < 2:
        return []
    return check_nvlink(parse_nvlink(_run("nvidia-smi", "nvlink", "--status")))


def _amd(facts: dict[str, str]) -> list[Finding]:
    if shutil.which(ROCM[0]) is None:
        return []
    cards = parse_rocm(_run(*ROCM))
    if cards:
        facts["GPU"] = f"{len(cards)} x AMD"
    return check_cards(cards)


def _xids(uncordoned_at: datetime | None) -> list[Finding]:
    if shutil.which("nvidia-smi") is None and not _has_nvidia_devices():
        return []
    since = datetime.now(UTC) - XID_AGE
    if uncordoned_at is not None:
        since = max(since, uncordoned_at)
    for command in KERNEL_LOGS:
        if shutil.which(command[0]) is None:
            continue
        try:
            return check_xids(parse_kernel_log(_run(*command).splitlines()), since)
        except ToolError:  # not allowed to this user
            continue
    says = "the kernel's log cannot be read here: Xid errors are not known"
    fix = "Let Ray's user read it: group systemd-journal, or `sysctl kernel.dmesg_restrict=0`."
    return [Finding(kind="gpu_xid", severity="warning", says=says, fix=fix)]


def _run(*command: str) -> str:
    """Output of a tool; ToolError with its last line if it fails or hangs."""
    name = " ".join(command)
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(
            f"`{name}` did not end within {COMMAND_TIMEOUT_S:g} s or could not be started: {error}"
        ) from error
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise ToolError(f"`{name}` ended with status {result.returncode}: {lines[-1]}")
    return result.stdout


def _devices(ports: Sequence[Port]) -> Devices:
    active = frozenset(port.device for port in ports if port.state == "ACTIVE")
    return Devices(interfaces=frozenset(psutil.net_if_addrs()), adapters=active)


def _folders(environment: Mapping[str, str]) -> dict[str, Path]:
    folders = {"TANDEM_HOME": settings().root, "TANDEM_CACHE": settings().cache.expanduser().resolve()}
    return {**folders, "TMPDIR": Path(environment.get("TMPDIR") or "/tmp")}
