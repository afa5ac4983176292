"""InfiniBand and RoCE ports, on folders in the form of /sys/class/infiniband; NCCL's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.cluster.health.rdma import check_ports, check_system, read_ports
from tandem.cluster.health.report import Finding
from tandem.cluster.health.transport import Devices, check_settings, matches

DEVICES = Devices(interfaces=frozenset({"lo", "eth0", "docker0"}), adapters=frozenset({"mlx5_0", "mlx5_1"}))


def port(
    root: Path,
    device: str,
    state: str = "4: ACTIVE",
    physical: str = "5: LinkUp",
    rate: str = "400 Gb/sec (4X NDR)",
    layer: str = "InfiniBand",
    **counters: int,
) -> None:
    folder = root / device / "ports" / "1"
    (folder / "counters").mkdir(parents=True)
    for name, text in (("state", state), ("phys_state", physical), ("rate", rate), ("link_layer", layer)):
        (folder / name).write_text(f"{text}\n")
    for name, count in {"link_downed": 0, "symbol_error": 0, **counters}.items():
        (folder / "counters" / name).write_text(f"{count}\n")


def severities(found: list[Finding]) -> list[str]:
    return [finding.severity for finding in found]


def test_ports_are_read_with_rate_and_counters(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_1")
    port(tmp_path, "mlx5_0", symbol_error=7)
    first, second = read_ports(tmp_path)
    assert (first.label, first.state, first.physical, first.rate_gbps) == ("mlx5_0 port 1", "ACTIVE", "LinkUp", 400.0)
    assert first.counters == {"link_downed": 0, "symbol_error": 7} and second.device == "mlx5_1"
    (found,) = check_ports([first, second])
    assert (found.severity, found.says) == ("ok", "2 ports are active, at up to 400 Gb/s")


def test_a_machine_without_adapters_is_in_order(tmp_path: Path) -> None:
    assert severities(check_ports(read_ports(tmp_path / "missing"))) == ["ok"]


def test_a_port_without_a_cable_is_a_warning_beside_one_that_works(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0")
    port(tmp_path, "mlx5_1", state="1: DOWN", physical="3: Disabled")
    (found,) = check_ports(read_ports(tmp_path))
    assert (found.severity, found.says) == ("warning", "mlx5_1 port 1 is DOWN (Disabled)")


def test_a_port_that_is_plugged_in_and_not_up_is_bad(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0")
    port(tmp_path, "mlx5_1", state="2: INIT")
    (found,) = check_ports(read_ports(tmp_path))
    assert (found.severity, found.says) == ("bad", "mlx5_1 port 1 is INIT (LinkUp)")


def test_a_node_of_which_no_port_is_active_is_bad(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0", state="1: DOWN", physical="2: Polling", layer="Ethernet")
    assert severities(check_ports(read_ports(tmp_path))) == ["bad"]


def test_a_slow_port_and_one_with_errors_are_warnings(tmp_path: Path) -> None:
    port(tmp_path, "mlx5_0")
    port(tmp_path, "mlx5_1", rate="100 Gb/sec (4X EDR)", symbol_error=40000, link_downed=9)
    slow, errors = check_ports(read_ports(tmp_path))
    assert (slow.severity, slow.says) == (
        "warning",
        "mlx5_1 port 1 runs at 100 Gb/s, and another port of this node at 400",
    )
    assert errors.severity == "warning" and "link_downed 9, symbol_error 40000" in errors.says


def test_locked_memory_and_peer_memory_matter_only_with_rdma(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.write_text("mlx5_core 1 0 - Live 0x0\n")
    assert check_system([], has_gpus=True, modules=modules, memlock=64 * 1024) == []
    port(tmp_path / "class", "mlx5_0")
    ports = read_ports(tmp_path / "class")
    locked, peer = check_system(ports, has_gpus=True, modules=modules, memlock=64 * 1024)
    assert locked.severity == "bad" and "64 KiB" in locked.says and peer.severity == "warning"
    modules.write_text("nvidia_peermem 16384 0 - Live 0x0\n")
    assert check_system(ports, has_gpus=True, modules=modules, memlock=-1) == []


@pytest.mark.parametrize(
    ("value", "name", "selected"),
    [
        ("eth", "eth0", True),
        ("=eth", "eth0", False),
        ("=eth0,eth1", "eth1", True),
        ("^docker", "docker0", False),
        ("^docker,lo", "eth0", True),
        ("mlx5_0:1", "mlx5_0", True),
    ],
)
def test_devices_are_selected_as_nccl_does(value: str, name: str, selected: bool) -> None:
    assert matches(value, name) == selected


@pytest.mark.parametrize(
    ("variables", "severity", "part"),
    [
        ({}, "ok", "none is set"),
        ({"NCCL_DEBUG": "WARN"}, "ok", "NCCL_DEBUG=WARN"),
        ({"NCCL_P2P_DISABLE": "1"}, "warning", "NVLink"),
        ({"NCCL_P2P_DISABLE": "0"}, "ok", ""),
        ({"NCCL_IB_DISABLE": "1"}, "warning", "TCP"),
        ({"NCCL_DEBUG": "INFO"}, "warning", "each rank logs"),
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "bad", "no network interface of this node; there are: docker0, eth0, lo"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "ok", ""),
        ({"NCCL_IB_HCA": "=mlx5_9"}, "bad", "no adapter with an active port"),
        ({"UCX_NET_DEVICES": "mlx5_0:1,eth9"}, "bad", "eth9"),
        ({"UCX_TLS": "tcp"}, "warning", "RDMA is not used"),
    ],
)
def test_variables_are_held_against_the_devices(variables: dict[str, str], severity: str, part: str) -> None:
    (found,) = check_settings({"PATH": "/bin", **variables}, DEVICES)
    assert found.severity == severity and part in found.says
    assert severity == "ok" or found.fix


def test_infiniband_may_be_switched_off_where_there_is_none() -> None:
    devices = Devices(interfaces=frozenset({"eth0"}), adapters=frozenset())
    assert severities(check_settings({"NCCL_IB_DISABLE": "1"}, devices)) == ["ok"]
