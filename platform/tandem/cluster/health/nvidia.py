"""NVIDIA GPUs: `nvidia-smi -q -x` and `nvidia-smi nvlink --status`, parsed and checked. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from tandem.cluster.health.report import Finding, amount

UNCORRECTABLE = ("sram_uncorrectable", "sram_uncorrectable_parity", "sram_uncorrectable_secded", "dram_uncorrectable")
"""Counters below `ecc_errors/volatile`, since the driver was loaded; one for SRAM in older drivers, two in newer ones."""
SLOWDOWNS = {
    "hw_slowdown": "the hardware slows it down",
    "hw_thermal_slowdown": "the hardware slows it down for its temperature",
    "hw_power_brake_slowdown": "the power supply slows it down",
    "sw_thermal_slowdown": "the driver slows it down for its temperature",
}
"""Reasons for lower clocks that are no property of the load."""
LINK = re.compile(r"^\s+Link (?P<link>\d+): (?P<state>.+?)\s*$")
GPU_LINE = re.compile(r"^GPU (?P<index>\d+): ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What `nvidia-smi` reports of one GPU; None where the driver or the GPU does not."""

    index: int
    bus_id: str
    name: str
    uncorrectable: float | None = None
    """Memory errors that could not be corrected, since the driver was loaded."""
    remap_pending: bool = False
    remap_failed: bool = False
    pages_pending: bool = False
    sram_threshold_exceeded: bool = False
    recovery_action: str = "None"
    """What the driver asks for: None, Reset, Reboot, Drain P2P, Drain and Reset."""
    slowdowns: tuple[str, ...] = ()
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    link_width: float | None = None
    max_link_width: float | None = None
    replays: float | None = None
    """PCI Express packets that were sent again, since the driver was loaded."""
    fabric: str = "N/A"
    """State of the NVSwitch fabric: Completed, In Progress, Not Started, N/A."""

    @property
    def label(self) -> str:
        """`GPU 0 (0000:3b:00)`."""
        return f"GPU {self.index} ({self.bus_id})"


@dataclass(frozen=True, kw_only=True, slots=True)
class NvidiaReport:
    """A node's driver and GPUs."""

    driver: str
    gpus: tuple[Gpu, ...]


def parse_query(xml: str) -> NvidiaReport:
    """The report in the output of `nvidia-smi -q -x`; ValueError if it is none."""
    try:
        root = ET.fromstring(xml)  # noqa: S314 - of this machine's own driver
    except ET.ParseError as error:
        raise ValueError(f"nvidia-smi -q -x did not print XML: {error}") from error
    gpus = tuple(_gpu(index, element) for index, element in enumerate(root.iter("gpu")))
    return NvidiaReport(driver=root.findtext("driver_version", "unknown").strip(), gpus=gpus)


def _gpu(index: int, element: ET.Element) -> Gpu:
    def text(path: str) -> str:
        return (element.findtext(path) or "N/A").strip()

    def is_yes(path: str) -> bool:
        return text(path).lower() == "yes"

    errors = [count for name in UNCORRECTABLE if (count := amount(text(f"ecc_errors/volatile/{name}"))) is not None]
    # The element was called clocks_throttle_reasons before driver 535.
    active = {
        reason.tag.removeprefix("clocks_event_reason_").removeprefix("clocks_throttle_reason_")
        for parent in ("clocks_event_reasons", "clocks_throttle_reasons")
        for reason in element.findall(f"{parent}/*")
        if (reason.text or "").strip() == "Active"
    }
    return Gpu(
        index=index,
        bus_id=short_bus_id(element.get("id", "unknown")),
        name=text("product_name"),
        uncorrectable=sum(errors) if errors else None,
        remap_pending=is_yes("remapped_rows/remapped_row_pending"),
        remap_failed=is_yes("remapped_rows/remapped_row_failure"),
        pages_pending=is_yes("retired_pages/pending_blacklist") or is_yes("retired_pages/pending_retirement"),
        sram_threshold_exceeded=is_yes("ecc_errors/aggregate/sram_threshold_exceeded"),
        recovery_action=text("gpu_recovery_action").replace("N/A", "None"),
        slowdowns=tuple(name for name in SLOWDOWNS if name in active),
        temperature_c=amount(text("temperature/gpu_temp")),
        sm_clock_mhz=amount(text("clocks/sm_clock")),
        max_sm_clock_mhz=amount(text("max_clocks/sm_clock")),
        link_width=amount(text("pci/pci_gpu_link_info/link_widths/current_link_width")),
        max_link_width=amount(text("pci/pci_gpu_link_info/link_widths/max_link_width")),
        replays=amount(text("pci/replay_counter")),
        fabric=text("fabric/state"),
    )


def short_bus_id(bus_id: str) -> str:
    """`0000:3b:00` of `00000000:3B:00.0`: the form that Xid messages have."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest.partition('.')[0]}" if rest else bus_id


def check_gpus(report: NvidiaReport) -> list[Finding]:
    """Findings about each GPU, and one for all where there is no problem."""
    found = [finding for gpu in report.gpus for check in (_memory, _state, _clocks, _pcie) for finding in check(gpu)]
    if not found and report.gpus:
        says = f"{len(report.gpus)} x {report.gpus[0].name}, driver {report.driver}: no errors"
        found = [Finding(kind="gpu_driver", severity="ok", says=says, values={"gpus": len(report.gpus)})]
    return found


def _memory(gpu: Gpu) -> Iterator[Finding]:
    reset = "Reset the GPU (`nvidia-smi --gpu-reset`) with nothing running on it."
    if gpu.uncorrectable:
        says = f"{gpu.label}: uncorrectable memory errors since the driver was loaded: {gpu.uncorrectable:g}"
        yield Finding(kind="gpu_ecc", severity="bad", says=says, fix=reset, values={"errors": gpu.uncorrectable})
    if gpu.remap_failed:
        says = f"{gpu.label}: a memory row could not be remapped; its spare rows may be used up"
        yield Finding(kind="gpu_ecc", severity="bad", says=says, fix="Have the GPU replaced.")
    if gpu.sram_threshold_exceeded:
        says = f"{gpu.label}: it has had more SRAM errors than NVIDIA allows"
        yield Finding(
            kind="gpu_ecc", severity="bad", says=says, fix="Run NVIDIA's field diagnostic, or have the GPU replaced."
        )
    if gpu.remap_pending or gpu.pages_pending:
        says = f"{gpu.label}: memory is remapped at the next reset"
        yield Finding(kind="gpu_ecc", severity="warning", says=says, fix=reset)


def _state(gpu: Gpu) -> Iterator[Finding]:
    if gpu.recovery_action != "None":
        says = f"{gpu.label}: the driver asks for: {gpu.recovery_action}"
        fix = "Do so with nothing running on the GPU."
        yield Finding(kind="gpu_driver", severity="bad", says=says, fix=fix, values={"action": gpu.recovery_action})
    if gpu.fabric in ("In Progress", "Not Started"):
        says = f"{gpu.label}: its NVSwitch fabric is {gpu.fabric.lower()}, and NCCL and CUDA wait for it"
        fix = "Check `systemctl status nvidia-fabricmanager` there."
        yield Finding(kind="nvlink", severity="bad", says=says, fix=fix, values={"fabric": gpu.fabric})


def _clocks(gpu: Gpu) -> Iterator[Finding]:
    if not gpu.slowdowns:
        return
    clocks = f"{gpu.sm_clock_mhz or 0:g} of {gpu.max_sm_clock_mhz or 0:g} MHz at {gpu.temperature_c or 0:g} C"
    yield Finding(
        kind="gpu_clocks",
        severity="warning",
        says=f"{gpu.label}: {'; '.join(SLOWDOWNS[name] for name in gpu.slowdowns)} ({clocks})",
        fix="Check the machine's cooling and power supply: one slow GPU slows every rank of a training run.",
        values={"sm_clock_mhz": gpu.sm_clock_mhz or 0.0, "temperature_c": gpu.temperature_c or 0.0},
    )


def _pcie(gpu: Gpu) -> Iterator[Finding]:
    # The generation falls when a GPU is idle; the number of lanes does not.
    if gpu.link_width and gpu.max_link_width and gpu.link_width < gpu.max_link_width:
        says = f"{gpu.label}: {gpu.link_width:g} of {gpu.max_link_width:g} PCI Express lanes"
        fix = "Compare with other nodes: reseat the GPU where they have more lanes."
        values = {"lanes": gpu.link_width, "max_lanes": gpu.max_link_width}
        yield Finding(kind="gpu_pcie", severity="warning", says=says, fix=fix, values=values)


def parse_nvlink(status: str) -> dict[int, dict[int, float | None]]:
    """Speed in GB/s of each GPU's links in `nvidia-smi nvlink --status`; None: the link is down. Without NVLink: empty."""
    found: dict[int, dict[int, float | None]] = {}
    links: dict[int, float | None] = {}
    for line in status.splitlines():
        if gpu := GPU_LINE.match(line):
            links = found.setdefault(int(gpu["index"]), {})
        elif match := LINK.match(line):
            links[int(match["link"])] = amount(match["state"]) if "GB/s" in match["state"] else None
    return {gpu: links for gpu, links in found.items() if links}


def check_nvlink(links: dict[int, dict[int, float | None]]) -> list[Finding]:
    """Findings about lanes that are down, and about GPUs with fewer or slower lanes than another one of the node."""
    # All lanes of all GPUs are down where no bridge is fitted, and a machine of one GPU has no use for them.
    speeds = {gpu: sum(speed or 0.0 for speed in each.values()) for gpu, each in links.items()}
    best = max(speeds.values(), default=0.0)
    if not best:
        return []
    found = []
    for gpu, each in sorted(links.items()):
        down: Sequence[int] = [link for link, speed in sorted(each.items()) if speed is None]
        if speeds[gpu] < best:
            lanes = f"links {', '.join(map(str, down))} of {len(each)} are down" if down else "its links are slower"
            says = f"GPU {gpu}: {lanes}; {speeds[gpu]:g} GB/s, and another GPU of this node has {best:g}"
            fix = "Reset the GPU; if the links stay down, have its NVLink connections checked."
            values: dict[str, float | str] = {"GBps": speeds[gpu], "best_GBps": best, "down": len(down)}
            found.append(Finding(kind="nvlink", severity="bad", says=says, fix=fix, values=values))
    return found or [Finding(kind="nvlink", severity="ok", says=f"{len(links)} GPUs with {best:g} GB/s of NVLink each")]
