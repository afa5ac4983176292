"""Settings of the libraries that move tensors between GPUs and nodes: NCCL (RCCL reads the same) and UCX. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tandem.cluster.health.report import Finding

PREFIXES = ("NCCL_", "RCCL_", "UCX_")
DEBUGGING: dict[str, str] = {
    "NCCL_P2P_DISABLE": "GPUs of a node copy through main memory instead of NVLink or PCI Express",
    "NCCL_SHM_DISABLE": "ranks of a node talk over the network instead of shared memory",
    "NCCL_IB_DISABLE": "InfiniBand and RoCE are not used, TCP is",
    "NCCL_NET_DISABLE_INTRA": "ranks of a node may not use the network where no other way exists",
}
"""Switches that are for debugging: each slows training down on hardware that is in order."""
NOISY = frozenset({"INFO", "TRACE"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What the variables may name."""

    interfaces: frozenset[str]
    """Network interfaces."""
    adapters: frozenset[str]
    """RDMA adapters with an active port."""


def transport_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of these libraries, sorted."""
    return {name: environment[name] for name in sorted(environment) if name.startswith(PREFIXES)}


def check_settings(environment: Mapping[str, str], devices: Devices) -> list[Finding]:
    """Findings about values that turn a transport off or name devices that are not there."""
    found = []
    for name, effect in DEBUGGING.items():
        needless = name == "NCCL_IB_DISABLE" and not devices.adapters
        if environment.get(name, "0") not in ("", "0") and not needless:
            fix = f"Remove {name} from the environment in which Ray starts, unless a fault of the hardware needs it."
            found.append(_warning(name, environment[name], effect, fix))
    if (level := environment.get("NCCL_DEBUG", "").upper()) in NOISY:
        found.append(_warning("NCCL_DEBUG", level, "each rank logs every communicator", "Set it to WARN."))
    found += _names("NCCL_SOCKET_IFNAME", environment, devices.interfaces, "network interface")
    found += _names("NCCL_IB_HCA", environment, devices.adapters, "adapter with an active port")
    for name in ("UCX_NET_DEVICES", "UCX_TLS"):
        value = environment.get(name, "")
        if name == "UCX_NET_DEVICES" and value not in ("", "all"):
            known = devices.interfaces | devices.adapters
            lacking = [each for each in value.split(",") if each.partition(":")[0] not in known]
            if lacking:
                found.append(_missing(name, value, ", ".join(lacking), known))
        elif name == "UCX_TLS" and value == "tcp" and devices.adapters:
            found.append(_warning(name, value, "RDMA is not used", "Remove it, or add rc."))
    settings = transport_settings(environment)
    if not found:
        says = ", ".join(f"{name}={value}" for name, value in settings.items()) or "none is set; the libraries choose"
        found = [Finding(kind="network_settings", severity="ok", says=says)]
    return found


def matches(value: str, name: str) -> bool:
    """Whether NCCL's list of prefixes (`eth`, `=eth0`, `^docker`, `mlx5_0:1`) selects a device."""
    excluded, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    patterns = [pattern.partition(":")[0] for pattern in value.lstrip("^").lstrip("=").split(",") if pattern]
    found = any(name == pattern if exact else name.startswith(pattern) for pattern in patterns)
    return found != excluded


def _names(variable: str, environment: Mapping[str, str], known: frozenset[str], kind: str) -> Iterable[Finding]:
    value = environment.get(variable, "")
    if not value or any(matches(value, name) for name in known):
        return []
    return [_missing(variable, value, f"no {kind}", known)]


def _missing(variable: str, value: str, lacking: str, known: Iterable[str]) -> Finding:
    there = ", ".join(sorted(known)) or "none"
    return Finding(
        kind="network_settings",
        severity="bad",
        says=f"{variable}={value} selects {lacking} of this node; there are: {there}",
        fix=f"Correct {variable} in the environment in which Ray starts, or remove it.",
        values={"variable": variable, "value": value},
    )


def _warning(name: str, value: str, effect: str, fix: str) -> Finding:
    values = {"variable": name, "value": value}
    return Finding(
        kind="network_settings", severity="warning", says=f"{name}={value}: {effect}", fix=fix, values=values
    )
