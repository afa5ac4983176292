"""InfiniBand and RoCE ports of /sys/class/infiniband, and what RDMA needs of the system."""

from __future__ import annotations

import contextlib
import resource
from dataclasses import dataclass, field
from pathlib import Path

from tandem.cluster.health.report import Finding, amount

CLASS = Path("/sys/class/infiniband")
MODULES = Path("/proc/modules")
COUNTERS = (
    "link_downed",
    "symbol_error",
    "port_rcv_errors",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
)
"""Counters of errors since the port came up; `link_downed` counts losses of the link."""
MAX_SYMBOL_ERRORS, MAX_LINK_LOSSES = 100, 3
"""More of these point at a cable or a transceiver. A link that was down a few times while machines were set up is no fault."""
PEER_MEMORY = ("nvidia_peermem", "nv_peer_mem")
"""Kernel modules by which an adapter reads a GPU's memory. Kernels with dma-buf need neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """One port of an adapter."""

    device: str
    number: int
    state: str
    """ACTIVE, INIT, DOWN, ARMED."""
    physical: str
    """LinkUp, Polling, Disabled, LinkErrorRecovery."""
    rate_gbps: float | None
    link_layer: str
    """InfiniBand or Ethernet (RoCE)."""
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """`mlx5_0 port 1`."""
        return f"{self.device} port {self.number}"


def read_ports(root: Path = CLASS) -> list[Port]:
    """All ports of this machine, in the order of their names; none without adapters."""
    return [
        Port(
            device=folder.parents[1].name,
            number=int(folder.name),
            # `4: ACTIVE`
            state=_read(folder / "state").rpartition(": ")[2],
            physical=_read(folder / "phys_state").rpartition(": ")[2],
            rate_gbps=amount(_read(folder / "rate")),
            link_layer=_read(folder / "link_layer"),
            counters=_counters(folder / "counters"),
        )
        for folder in sorted(root.glob("*/ports/*"))
        if folder.name.isdigit()
    ]


def check_ports(ports: list[Port]) -> list[Finding]:
    """Findings about links that are down, slower than others of the node, or have errors."""
    if not ports:
        return [Finding(kind="rdma", severity="ok", says="no InfiniBand or RoCE adapter; NCCL uses TCP between nodes")]
    active = [port for port in ports if port.state == "ACTIVE"]
    # An adapter's second port is often not connected: only a node without any link, or an InfiniBand port that is plugged in and
    # does not come up, is bad.
    fastest = max((port.rate_gbps or 0.0 for port in active), default=0.0)
    found = []
    for port in ports:
        values: dict[str, float | str] = {"state": port.state, "physical": port.physical, "Gbps": port.rate_gbps or 0.0}
        if port.state != "ACTIVE":
            broken = not active or (
                port.link_layer == "InfiniBand" and port.physical in ("LinkUp", "LinkErrorRecovery")
            )
            fix = "Check cable and switch, and that a subnet manager runs (`ibstat`, `sminfo`)."
            says = f"{port.label} is {port.state} ({port.physical})"
            found.append(
                Finding(kind="rdma", severity="bad" if broken else "warning", says=says, fix=fix, values=values)
            )
        elif (port.rate_gbps or 0.0) < fastest:
            says = f"{port.label} runs at {port.rate_gbps or 0:g} Gb/s, and another port of this node at {fastest:g}"
            fix = "Compare the cables; NCCL_IB_HCA names the ports that NCCL is to use."
            found.append(Finding(kind="rdma", severity="warning", says=says, fix=fix, values=values))
        found.extend(_errors(port))
    if not found:
        says = f"{len(active)} ports are active, at up to {fastest:g} Gb/s"
        found = [Finding(kind="rdma", severity="ok", says=says, values={"ports": len(active), "Gbps": fastest})]
    return found


def _errors(port: Port) -> list[Finding]:
    losses, symbols = port.counters.get("link_downed", 0), port.counters.get("symbol_error", 0)
    if losses <= MAX_LINK_LOSSES and symbols <= MAX_SYMBOL_ERRORS:
        return []
    counted = ", ".join(f"{name} {count}" for name, count in port.counters.items() if count)
    return [
        Finding(
            kind="rdma",
            severity="warning",
            says=f"{port.label} has errors since it came up: {counted}",
            fix="Clean or replace the cable, set the counters back (`perfquery -R`), and look again.",
            values=dict(port.counters),
        )
    ]


def check_system(
    ports: list[Port], *, has_gpus: bool, modules: Path = MODULES, memlock: int | None = None
) -> list[Finding]:
    """Findings about locked memory and the kernel modules that RDMA needs. `memlock`: bytes; None: the limit of this process."""
    if not any(port.state == "ACTIVE" for port in ports):
        return []
    found = []
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if memlock is None else memlock
    if limit != resource.RLIM_INFINITY and limit < 2**30:
        says = f"Ray's processes may lock {limit // 1024} KiB of memory, and RDMA locks its buffers"
        fix = "Raise the limit before Ray starts: `ulimit -l unlimited` (containers: --ulimit memlock=-1)."
        found.append(Finding(kind="rdma", severity="bad", says=says, fix=fix, values={"memlock": limit}))
    loaded = {line.partition(" ")[0] for line in _read(modules).splitlines()}
    if has_gpus and not loaded.intersection(PEER_MEMORY):
        says = "neither nvidia_peermem nor nv_peer_mem is loaded: without dma-buf, GPUs' data goes through main memory"
        fix = "Run `modprobe nvidia_peermem`, or check that NCCL's log says GDRDMA."
        found.append(Finding(kind="rdma", severity="warning", says=says, fix=fix))
    return found


def _counters(folder: Path) -> dict[str, int]:
    found = {}
    for name in COUNTERS:
        with contextlib.suppress(ValueError):
            found[name] = int(_read(folder / name))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
