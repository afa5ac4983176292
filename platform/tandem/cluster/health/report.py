"""Findings about one node, and the report that holds them. Plain data: it travels from the node as a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Severity = Literal["ok", "warning", "bad"]

KINDS: dict[str, str] = {
    "node_silent": "the node has not answered in time",
    "gpu_driver": "the GPU driver does not answer, or a GPU has been lost",
    "gpu_xid": "Xid errors of the NVIDIA driver in the kernel's log",
    "gpu_ecc": "memory errors, row remapping, retired pages",
    "gpu_clocks": "clocks lowered by temperature or power",
    "gpu_pcie": "a narrow or slow PCI Express link",
    "nvlink": "NVLink lanes that are down",
    "rdma": "InfiniBand and RoCE ports, and what RDMA needs of the system",
    "network_settings": "NCCL, RCCL and UCX variables",
    "disk": "free space of the folders that Tandem writes to",
    "memory": "shared memory and limits",
    "time": "the clock beside that of the asking node",
    "serving": "HAProxy and what else serving needs",
    "difference": "a driver, GPU or setting that other nodes do not have",
}
"""Kinds of findings; a policy names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One observation."""

    kind: str
    """A key of `KINDS`."""
    severity: Severity
    """ok, warning (works; may be slow, or fail later) or bad (work on this node fails or is wrong)."""
    says: str
    """The fact, with its numbers."""
    fix: str = ""
    """The next step; every finding that is not ok has one."""
    values: Mapping[str, float | str] = field(default_factory=dict)
    """The numbers, for programs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """The findings about one node of a cluster."""

    node_id: str
    """Ray's id; another one after Ray has been started again."""
    address: str
    """The node's IP address."""
    host: str
    findings: tuple[Finding, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    """Properties in which the nodes of a cluster should be alike, such as the driver's version."""
    cordon: str | None = None
    """Reason of the node's cordon; None: work may be placed on it."""
    alive: bool = True
    """Whether Ray lists the node as alive."""

    @property
    def severity(self) -> Severity:
        """The worst of the findings."""
        found = {finding.severity for finding in self.findings}
        return "bad" if "bad" in found else "warning" if "warning" in found else "ok"

    def with_findings(self, *more: Finding) -> NodeReport:
        """The report with further findings."""
        return replace(self, findings=(*self.findings, *more))

    def to_json(self) -> dict[str, Any]:
        """The report for `--json`."""
        return {**asdict(self), "severity": self.severity}


def amount(text: str | None) -> float | None:
    """The number in `1980 MHz`, `16x` or `0`; None for `N/A` and the like."""
    digits = "".join(character for character in (text or "").split(" ")[0] if character.isdigit() or character in ".-")
    try:
        return float(digits)
    except ValueError:
        return None
