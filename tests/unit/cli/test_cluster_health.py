"""Cordons on the command line, and a cluster's report as it is printed; Ray is not needed for either."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from tandem.auth.audit_log import AuditLog
from tandem.cli.cluster_health import _show, apps_message
from tandem.cli.main import app
from tandem.cluster.health.cordons import Cordon, read_cordons, write_cordon
from tandem.cluster.health.policy import decide
from tandem.cluster.health.report import Finding, NodeReport, Severity


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    for name in ("RAY_ADDRESS", "TANDEM_DATABASE_URL", "TANDEM_CORDON_ON"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "250"})
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def report(address: str, severity: Severity, says: str = "Xid 79") -> NodeReport:
    finding = Finding(kind="gpu_xid", severity=severity, says=says, fix="Reboot it.")
    return NodeReport(node_id=address * 8, address=address, host="h", findings=(finding,))


def test_cordons_are_listed_and_removed() -> None:
    assert run("cluster", "cordons") == (0, "No node is cordoned.")
    write_cordon(
        Cordon(node="10.0.0.7", reason="Xid 79", by="ann@h", at=datetime(2026, 11, 30, tzinfo=UTC), automatic=True)
    )
    status, said = run("cluster", "cordons")
    assert status == 0 and "10.0.0.7" in said and "Xid 79" in said and "(policy)" in said
    assert json.loads(run("cluster", "cordons", "--json")[1])[0]["node"] == "10.0.0.7"
    status, said = run("cluster", "uncordon", "10.0.0.7")
    assert status == 0 and said.startswith("10.0.0.7 is not cordoned any more.")
    assert "until `tandem serve deploy`" in said
    assert read_cordons() == ()
    (entry,) = AuditLog.open().page()
    assert (entry.action, entry.target) == ("nodes.uncordon", "10.0.0.7")


def test_a_node_that_is_not_cordoned_cannot_be_uncordoned() -> None:
    status, said = run("cluster", "uncordon", "10.0.0.9")
    assert status == 1 and "0 cordons are named '10.0.0.9'" in said


def test_without_a_cluster_both_commands_say_where_to_run_them() -> None:
    for arguments in (("doctor", "--cluster"), ("cluster", "cordon", "10.0.0.7")):
        status, said = run(*arguments)
        assert status == 1 and "No cluster runs here" in said and "RAY_ADDRESS" in said


def test_a_policy_with_an_unknown_kind_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CORDON_ON", "gpu_exid")
    status, said = run("doctor", "--cluster")
    assert status == 2 and "Did you mean 'gpu_xid'?" in said


def test_a_cordon_tells_of_the_deploy_that_each_app_needs() -> None:
    replica = {"node_id": "a"}
    apps = {"chat": {"deployments": {"Engine": {"replicas": [replica, {"node_id": "b"}]}}}}
    assert apps_message({}, "a") == ""
    said = apps_message(apps, "a")
    assert "1 replica runs there and stays: chat/Engine." in said and "`tandem serve deploy`" in said
    # Serve may start one there later.
    said = apps_message(apps, "c")
    assert "No replica runs there." in said and "(chat)" in said and "`tandem serve deploy`" in said
    said = apps_message(apps, "a", drained=True)
    assert "stay" not in said and "if this one is started again" in said and "`tandem serve deploy`" in said


def test_the_report_names_bad_nodes_and_the_command_that_keeps_them_out() -> None:
    text = io.StringIO()
    reports = [report("10.0.0.1", "ok"), report("10.0.0.2", "bad"), report("10.0.0.3", "bad")]
    _show(Console(file=text, width=200), reports, decide(reports, frozenset({"gpu_xid"})))
    said = text.getvalue()
    assert "Cordoned 10.0.0.2 for gpu_xid" in said and "10.0.0.3 is not cordoned: half of the nodes" in said
    assert "3 nodes: 2 bad, 1 ok" in said and "`tandem cluster cordon 10.0.0.3`" in said
    assert "`tandem cluster cordon 10.0.0.2`" not in said and "→ Reboot it." in said
