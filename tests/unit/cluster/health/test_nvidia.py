"""NVIDIA's tools, on samples of their output (data/README.md says how they were made)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tandem.cluster.health.nvidia import check_gpus, check_nvlink, parse_nvlink, parse_query
from tandem.cluster.health.xid import CODES, check_xids, parse_kernel_log

DATA = Path(__file__).with_name("data")


def read(name: str) -> str:
    return (DATA / name).read_text()


def test_gpus_in_order_are_one_finding() -> None:
    report = parse_query(read("nvidia-smi-good.xml"))
    assert report.driver == "570.124.06"
    assert [gpu.bus_id for gpu in report.gpus] == ["0000:1b:00", "0000:43:00"]
    (found,) = check_gpus(report)
    assert (found.severity, found.says) == ("ok", "2 x NVIDIA H100 80GB HBM3, driver 570.124.06: no errors")


def test_a_power_limit_and_an_idle_gpu_are_no_slowdown() -> None:
    assert all(gpu.slowdowns == () for gpu in parse_query(read("nvidia-smi-good.xml")).gpus)


def test_each_fault_is_named_with_its_gpu_and_numbers() -> None:
    found = check_gpus(parse_query(read("nvidia-smi-bad.xml")))
    first, second = "GPU 0 (0000:1b:00)", "GPU 1 (0000:43:00)"
    assert [(f.kind, f.severity, f.says.partition(":")[0]) for f in found[:2]] == [
        ("gpu_ecc", "bad", "GPU 0 (0000"),
        ("gpu_ecc", "bad", "GPU 0 (0000"),
    ]
    assert found[0].says == f"{first}: uncorrectable memory errors since the driver was loaded: 4"
    assert found[0].values == {"errors": 4}
    says = [f.says for f in found]
    assert f"{first}: the driver asks for: Reset" in says
    assert f"{second}: 8 of 16 PCI Express lanes" in says
    (clocks,) = [f for f in found if f.kind == "gpu_clocks"]
    assert clocks.severity == "warning" and "345 of 1980 MHz at 91 C" in clocks.says
    (fabric,) = [f for f in found if f.kind == "nvlink"]
    assert fabric.severity == "bad" and "in progress" in fabric.says
    assert all(f.fix for f in found)


def test_an_older_driver_without_ecc_is_read_too() -> None:
    report = parse_query(read("nvidia-smi-470.xml"))
    (gpu,) = report.gpus
    assert gpu.uncorrectable is None and gpu.slowdowns == ("sw_thermal_slowdown",) and gpu.recovery_action == "None"
    (found,) = check_gpus(report)
    assert (found.kind, found.severity) == ("gpu_clocks", "warning")


def test_output_that_is_no_xml_is_an_error() -> None:
    with pytest.raises(ValueError, match="did not print XML"):
        parse_query("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")


def test_nvlink_lanes_that_are_down_are_counted() -> None:
    (good,) = check_nvlink(parse_nvlink(read("nvlink-good.txt")))
    assert (good.severity, good.says) == ("ok", "2 GPUs with 478.116 GB/s of NVLink each")
    (bad,) = check_nvlink(parse_nvlink(read("nvlink-down.txt")))
    assert bad.severity == "bad"
    assert bad.says.startswith(
        "GPU 1: links 3, 17 of 18 are down; 424.992 GB/s, and another GPU of this node has 478.116"
    )


def test_gpus_without_nvlink_have_no_finding() -> None:
    assert check_nvlink(parse_nvlink(read("nvlink-none.txt"))) == []


def test_xids_are_counted_by_gpu_and_those_of_programs_left_out() -> None:
    found = check_xids(parse_kernel_log(read("dmesg.txt").splitlines()))
    assert [(f.values["device"], f.values["xid"], f.values["count"], f.severity) for f in found] == [
        ("0000:1b:00", 999, 1, "warning"),
        ("0000:43:00", 63, 1, "warning"),
        ("0000:43:00", 94, 2, "warning"),
        ("0000:ca:00", 79, 1, "bad"),
    ]
    assert found[-1].says == "GPU 0000:ca:00: Xid 79 (the GPU has fallen off the bus), once since the log begins"
    assert "Reboot" in found[-1].fix and all(f.fix for f in found)


def test_a_line_of_journalctl_with_its_prefix_is_read() -> None:
    line = (
        "Nov 30 09:59:27 h1 kernel: NVRM: Xid (PCI:0000:01:00): 119, pid=1122, name=python, Timeout after 6s of waiting"
    )
    (xid,) = parse_kernel_log([line])
    assert (xid.device, xid.code) == ("0000:01:00", 119)


def test_xids_from_before_the_time_that_counts_are_left_out() -> None:
    messages = parse_kernel_log(
        [
            # dmesg --time-format iso, journalctl -o short-iso, and a line without a zone, which counts.
            "2026-11-30T09:59:27,123456+01:00 NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.",
            "2026-11-30T11:30:00+0000 h1 kernel: NVRM: Xid (PCI:0000:02:00): 79, GPU has fallen off the bus.",
            "2026-11-29T11:30:00 h1 kernel: NVRM: Xid (PCI:0000:03:00): 79, GPU has fallen off the bus.",
        ]
    )
    assert messages[0].at == datetime(2026, 11, 30, 8, 59, 27, 123456, tzinfo=UTC)
    found = check_xids(messages, since=datetime(2026, 11, 30, 9, tzinfo=UTC))
    assert [each.values["device"] for each in found] == ["0000:02:00", "0000:03:00"]
    assert found[0].says.endswith("once since 2026-11-30 09:00 UTC")
    assert CODES[119][0] == "bad"
