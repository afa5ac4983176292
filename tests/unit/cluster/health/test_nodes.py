"""Findings about hosts, clocks, serving and differences; cordons and the policy that sets them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tandem.cluster.health import collect as module
from tandem.cluster.health.amd import check_cards, parse_rocm
from tandem.cluster.health.collect import collect
from tandem.cluster.health.cordons import (
    ClusterNode,
    Cordon,
    cordon_of,
    find_cordon,
    find_node,
    placement_selector,
    read_cordons,
    remove_cordon,
    selector_without,
    stable_name,
    uncordoned_at,
    write_cordon,
)
from tandem.cluster.health.host import check_disks, check_memory
from tandem.cluster.health.nodes import differences, time_finding
from tandem.cluster.health.policy import decide, parse_kinds
from tandem.cluster.health.report import Finding, NodeReport, Severity, amount
from tandem.cluster.health.serving import check_serving, socket_problem
from tandem.errors import ClusterError, ConfigError

NODES = [
    ClusterNode(id="a" * 56, address="10.0.0.1", host="h1", is_head=True),
    ClusterNode(id="b" * 56, address="10.0.0.2", host="h2"),
    ClusterNode(id="c" * 56, address="10.0.0.2", host="h2"),
]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir(mode=0o700)
    return tmp_path / "home"


def cordon(node: str, reason: str = "noisy fan") -> Cordon:
    return Cordon(node=node, reason=reason, by="ann@login", at=datetime(2026, 11, 30, tzinfo=UTC))


def report(node: str, severity: Severity = "ok", kind: str = "gpu_xid", **more: object) -> NodeReport:
    finding = Finding(kind=kind, severity=severity, says="x", fix="y")
    return NodeReport(node_id=node, address=node, host=node, findings=(finding,), **more)  # type: ignore[arg-type]


def test_amounts_are_read_without_their_units() -> None:
    assert [amount(text) for text in ("1980 MHz", "16x", "0", "41.5", "N/A", "", None, "(132Mhz)")] == [
        1980.0, 16.0, 0.0, 41.5, None, None, None, 132.0,
    ]  # fmt: skip


def test_amd_cards_are_read_behind_warnings() -> None:
    cards = parse_rocm((Path(__file__).with_name("data") / "rocm-smi.json").read_text())
    assert sorted(cards) == ["card0", "card1"]
    found = check_cards(cards)
    assert sorted((f.kind, f.severity) for f in found) == [
        ("gpu_clocks", "warning"), ("gpu_ecc", "bad"), ("gpu_ecc", "warning"),
    ]  # fmt: skip
    assert all(f.says.startswith("card1") for f in found)
    assert [f.severity for f in check_cards({"card0": cards["card0"]})] == ["ok"]


def test_a_report_of_this_machine_is_whole_without_any_hardware() -> None:
    found = collect("id", "127.0.0.1")
    assert {"rdma", "network_settings", "disk", "memory", "serving"} <= {finding.kind for finding in found.findings}
    assert json.loads(json.dumps(found.to_json()))["severity"] == found.severity


def test_a_tool_that_fails_is_a_bad_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'No devices were found' >&2\nexit 6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (found,) = [f for f in collect("id", "127.0.0.1").findings if f.kind == "gpu_driver"]
    assert found.severity == "bad"
    assert found.says == "`nvidia-smi -q -x` ended with status 6: No devices were found"


def test_a_tool_that_hangs_is_a_bad_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(module, "COMMAND_TIMEOUT_S", 0.3)
    (found,) = [f for f in collect("id", "127.0.0.1").findings if f.kind == "gpu_driver"]
    assert found.severity == "bad" and "did not end within 0.3 s" in found.says


def test_an_nvidia_node_is_read_through_its_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(__file__).with_name("data")
    for name, text in (
        ("nvidia-smi", f'[ "$1" = nvlink ] && exec cat {data}/nvlink-down.txt\nexec cat {data}/nvidia-smi-good.xml'),
        ("dmesg", f"exec cat {data}/dmesg.txt"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = collect("id", "127.0.0.1")
    assert found.facts["GPU"] == "2 x NVIDIA H100 80GB HBM3" and found.facts["driver"] == "570.124.06"
    assert {f.kind for f in found.findings if f.severity == "bad"} == {"gpu_xid", "nvlink"}


def test_a_failing_nvlink_query_leaves_the_other_findings_of_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(__file__).with_name("data")
    nvlink = '[ "$1" = nvlink ] && { echo "Unable to query" >&2; exit 3; }'
    for name, text in (
        ("nvidia-smi", f"{nvlink}\nexec cat {data}/nvidia-smi-good.xml"),
        ("dmesg", f"exec cat {data}/dmesg.txt"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = collect("id", "127.0.0.1")
    assert {f.kind for f in found.findings if f.severity == "bad"} == {"gpu_xid", "nvlink"}
    assert {"gpu_ecc", "gpu_driver"} & {f.kind for f in found.findings}
    (failed,) = [f for f in found.findings if f.kind == "nvlink"]
    assert failed.says == "`nvidia-smi nvlink --status` ended with status 3: Unable to query"


def test_xids_from_before_the_last_uncordon_or_older_than_a_day_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = NODES[0]
    now = datetime.now(UTC)
    lines = [
        f"{now - timedelta(hours=30):%Y-%m-%dT%H:%M:%S,000000+00:00} NVRM: Xid (PCI:0000:01:00): 79, lost.",
        f"{now - timedelta(hours=2):%Y-%m-%dT%H:%M:%S,000000+00:00} NVRM: Xid (PCI:0000:02:00): 79, lost.",
    ]
    (tmp_path / "log").write_text("\n".join(lines))
    for name, text in (("nvidia-smi", "exit 6"), ("dmesg", f"exec cat {tmp_path}/log")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def xids() -> list[object]:
        report = collect(node.id, node.address, uncordoned_at(node))
        return [finding.values["device"] for finding in report.findings if finding.kind == "gpu_xid"]

    assert uncordoned_at(node) is None and xids() == ["0000:02:00"]
    write_cordon(cordon(node.address))
    assert remove_cordon(node.address) and read_cordons() == ()
    assert uncordoned_at(node) is not None and uncordoned_at(NODES[1]) is None
    assert xids() == []


def test_xids_are_read_where_nvidia_smi_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(__file__).with_name("data")
    for name, text in (("nvidia-smi", "exit 6"), ("dmesg", f"exec cat {data}/dmesg.txt")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = collect("id", "127.0.0.1")
    assert {f.kind for f in found.findings if f.severity == "bad"} >= {"gpu_xid", "gpu_driver"}


def test_a_full_disk_and_a_small_shared_memory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.cluster.health import host

    assert [f.severity for f in check_disks({"TANDEM_HOME": tmp_path / "not" / "there"})] == ["ok"]
    monkeypatch.setattr(host, "DISK_WANTED", 2**60)
    (little,) = check_disks({"TANDEM_HOME": tmp_path, "TMPDIR": tmp_path})
    assert little.severity == "warning" and "TANDEM_HOME" in little.fix
    monkeypatch.setattr(host, "SHM_WANTED", 2**60)
    small, files = check_memory(tmp_path, files=1024)
    assert (small.severity, files.severity) == ("bad", "warning")


@pytest.mark.parametrize(
    ("round_trip_s", "offset_s", "severity"),
    [(0.01, 0.02, "ok"), (0.01, -3.0, "warning"), (0.01, 20.0, "bad"), (60.0, 20.0, "ok")],
)
def test_a_clock_counts_as_wrong_only_beyond_the_round_trip(
    round_trip_s: float, offset_s: float, severity: str
) -> None:
    found = time_finding(round_trip_s, offset_s)
    assert found.severity == severity
    assert ("ahead of" if offset_s > 0 else "behind") in found.says


def test_a_node_that_differs_from_nodes_with_the_same_gpus_is_named() -> None:
    same = {"GPU": "8 x H100", "driver": "570", "NCCL_DEBUG": "WARN"}
    reports = [
        report("a", facts=same),
        report("b", facts=same),
        report("c", facts={**same, "driver": "565"}),
        report("d", facts={"GPU": "4 x L4", "driver": "550"}),
    ]
    found = {each.node_id: [f.says for f in each.findings if f.kind == "difference"] for each in differences(reports)}
    assert found == {"a": [], "b": [], "c": ["driver is 565; on 2 nodes with the same GPUs it is 570"], "d": []}


def test_serving_without_haproxy_is_a_warning() -> None:
    (found,) = check_serving({})
    assert found.severity == "warning" and "RAY_SERVE_ENABLE_HA_PROXY=1" in found.fix


def test_serving_by_rays_defaults_lacks_a_long_hard_stop_and_a_private_socket() -> None:
    stop, socket = check_serving({"RAY_SERVE_ENABLE_HA_PROXY": "1"}, drain_timeout_s=600)
    assert stop.severity == socket.severity == "bad"
    assert "120 s" in stop.says and "600 s" in stop.says and "admin socket" in socket.says


def test_serving_on_a_node_of_tandem_is_in_order(tmp_path: Path) -> None:
    from tandem.cluster.haproxy import serving_environment

    (tmp_path / "node").mkdir(mode=0o700)
    environment = serving_environment(tmp_path / "node", [1, 2, 3, 4], range(30000, 30010))
    assert [f.severity for f in check_serving(environment, drain_timeout_s=600)] == ["ok"]


def test_a_socket_is_private_behind_a_folder_of_its_owner(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    assert socket_problem(private / "h" / "admin.sock") is None
    assert "every user" in (socket_problem(Path("/tmp/no-such-folder/admin.sock")) or "")


def test_a_cordon_is_kept_and_removed(home: Path) -> None:
    assert read_cordons() == ()
    write_cordon(cordon("10.0.0.2"))
    write_cordon(cordon("h/../odd"))
    (home / "cordons" / "broken.json").write_text("{")
    assert {each.node for each in read_cordons()} == {"10.0.0.2", "h/../odd"}
    write_cordon(cordon("10.0.0.2", reason="Xid 79"))
    assert [each.reason for each in read_cordons() if each.node == "10.0.0.2"] == ["Xid 79"]
    assert remove_cordon("10.0.0.2") and not remove_cordon("10.0.0.2")


def test_nodes_are_found_by_address_host_and_the_start_of_an_id() -> None:
    assert find_node("10.0.0.1", NODES) is find_node("h1", NODES) is find_node("a" * 8, NODES) is NODES[0]
    with pytest.raises(ClusterError, match="name one by its id: bbbbbbbb, cccccccc"):
        find_node("h2", NODES)
    with pytest.raises(ClusterError, match="No node of the cluster is '10.0.0.3'. Did you mean '10.0.0"):
        find_node("10.0.0.3", NODES)
    with pytest.raises(ClusterError, match="No node"):
        find_node("a" * 4, NODES)


def test_a_cordon_is_found_by_its_whole_name_or_the_start_of_an_id() -> None:
    kept = [cordon("10.0.0.12"), cordon("b" * 56)]
    assert find_cordon("10.0.0.12", kept) is kept[0] and find_cordon("b" * 12, kept) is kept[1]
    with pytest.raises(ClusterError, match=r"0 cordons are named '10.0.0.1'. Cordoned are: 10.0.0.12, b"):
        find_cordon("10.0.0.1", kept)


def test_a_machine_is_cordoned_by_address_and_one_of_several_nodes_on_it_by_id() -> None:
    assert stable_name(NODES[0], NODES) == "10.0.0.1"
    assert stable_name(NODES[1], NODES) == NODES[1].id
    assert cordon_of(NODES[0], [cordon("h1")]) and not cordon_of(NODES[1], [cordon("h1")])


def test_the_selector_leaves_out_what_is_cordoned() -> None:
    from ray._private.label_utils import validate_label_selector

    assert selector_without([]) == {}
    selector = selector_without([NODES[1].id, NODES[0].id])
    assert selector == {"ray.io/node-id": f"!in({NODES[0].id},{NODES[1].id})"}
    assert validate_label_selector(selector) is None


def test_without_a_cluster_there_is_no_selector() -> None:
    write_cordon(cordon("10.0.0.2"))
    assert placement_selector() == {}


def test_a_policy_names_kinds_that_exist() -> None:
    assert parse_kinds(None) == parse_kinds(" ") == frozenset()
    assert parse_kinds("gpu_xid, gpu_ecc") == {"gpu_xid", "gpu_ecc"}
    with pytest.raises(ConfigError, match="TANDEM_CORDON_ON names 'gpu_xit'. Did you mean 'gpu_xid'"):
        parse_kinds("gpu_xit")


def test_a_policy_cordons_bad_nodes_of_its_kinds_only() -> None:
    reports = [
        report("a", "bad"),
        report("b", "warning"),
        report("c", "bad", kind="disk"),
        report("d", "bad", cordon="known"),
    ]
    decision = decide(reports, frozenset({"gpu_xid"}))
    assert [each.node_id for each, _ in decision.cordon] == ["a"] and decision.spared == ()


def test_a_policy_leaves_half_of_the_cluster_in() -> None:
    reports = [report("a", "bad"), report("b", "bad"), report("c", "bad", cordon="known"), report("d")]
    decision = decide(reports, frozenset({"gpu_xid"}))
    assert len(decision.cordon) == 1 and len(decision.spared) == 1
    assert decide([report("a", "bad")], frozenset({"gpu_xid"})).cordon == ()
