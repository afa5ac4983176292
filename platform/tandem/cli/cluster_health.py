"""`tandem doctor --cluster` and the cordons of `tandem cluster`: which nodes are fit for work, and which are kept out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tandem.auth.audit_log import AuditLog
from tandem.cli.support.findings import Finding, State, findings_table
from tandem.cli.support.shell import friendly_errors
from tandem.cluster.health.cordons import (
    Cordon,
    cluster_nodes,
    find_cordon,
    find_node,
    read_cordons,
    remove_cordon,
    stable_name,
    write_cordon,
)
from tandem.cluster.health.policy import Decision, parse_kinds
from tandem.cluster.health.report import NodeReport, Severity
from tandem.cluster.local import connect
from tandem.db.audit import Change
from tandem.errors import ClusterError, TandemError
from tandem.sdk.cluster import connected
from tandem.sdk.console import console, errors
from tandem.sdk.keys import operator
from tandem.settings import settings

if TYPE_CHECKING:
    from tandem.cluster.health.cordons import ClusterNode

STATES: dict[Severity, State] = {"ok": "ok", "warning": "note", "bad": "problem"}
DRAIN_DEADLINE_S = 3600.0
DEPLOY = "`tandem serve deploy` (with `--set app=NAME` for another app than tandem)"
NodeArgument = Annotated[str, typer.Argument(help="IP address or host name of the node, or the start of Ray's id.")]
AddressOption = Annotated[
    str | None, typer.Option(help="host:port of the cluster; unset: RAY_ADDRESS, or this home's local one.")
]


def run_cluster_doctor(terminal: Console, *, address: str | None = None, as_json: bool = False) -> int:
    """Print a report of every node, and apply TANDEM_CORDON_ON. Returns 1 if a node is bad and not cordoned, else 0."""
    with friendly_errors():
        kinds = parse_kinds(settings().cordon_on)
        with _cluster(address):
            from tandem.cluster.health.nodes import apply_policy, examine

            with errors.status("Looking at every node"):
                reports = examine()
                decision = apply_policy(reports, kinds, operator()) if kinds else Decision()
        now_out = {report.node_id for report, _ in decision.cordon}
        bad = [report for report in reports if report.severity == "bad" and report.cordon is None]
        if as_json:
            nodes = [report.to_json() for report in reports]
            terminal.print_json(json.dumps({"nodes": nodes, "cordoned_now": sorted(now_out)}))
        else:
            _show(terminal, reports, decision)
        return int(any(report.node_id not in now_out for report in bad))
    raise AssertionError  # friendly_errors leaves the process


def _show(terminal: Console, reports: Sequence[NodeReport], decision: Decision) -> None:
    for report in reports:
        out = f"  [yellow]cordoned: {escape(report.cordon)}[/]" if report.cordon is not None else ""
        terminal.print(f"[bold]{report.address}[/]  {escape(report.host)}  {report.node_id[:8]}{out}")
        rows = [
            Finding(name=finding.kind, state=STATES[finding.severity], says=finding.says, fix=finding.fix)
            for finding in sorted(report.findings, key=lambda each: ("bad", "warning", "ok").index(each.severity))
        ]
        terminal.print(findings_table(rows))
        terminal.print()
    for report, finding in decision.cordon:
        terminal.print(f"[yellow]Cordoned {report.address}[/] for {finding.kind} (TANDEM_CORDON_ON).")
    for report in decision.spared:
        terminal.print(f"{report.address} is not cordoned: half of the nodes are at most.")
    counts = {kind: [report for report in reports if report.severity == kind] for kind in ("bad", "warning", "ok")}
    terminal.print(
        f"{len(reports)} {'node' if len(reports) == 1 else 'nodes'}: "
        + ", ".join(f"{len(found)} {kind}" for kind, found in counts.items() if found)
    )
    for report in counts["bad"]:
        kinds = ", ".join(dict.fromkeys(finding.kind for finding in report.findings if finding.severity == "bad"))
        terminal.print(f"[red]Bad: {report.address}[/] ({escape(report.host)}): {kinds}")
        if report.alive and report.cordon is None and report not in [each for each, _ in decision.cordon]:
            terminal.print(f"  [cyan]→ `tandem cluster cordon {report.address}` keeps new work away from it.[/]")


def cordon_command(
    node: NodeArgument,
    reason: Annotated[str, typer.Option(help="Why, for those who read the list.")] = "",
    drain: Annotated[
        bool, typer.Option("--drain", help="Move off what runs there too; the node then leaves the Ray cluster.")
    ] = False,
    deadline_s: Annotated[
        float, typer.Option(min=1, help="With --drain: seconds until the node leaves with what still runs on it.")
    ] = DRAIN_DEADLINE_S,
    address: AddressOption = None,
) -> None:
    """Keep a node out: no replica and no training worker is placed there from now on. What runs there stays."""
    with friendly_errors(), _cluster(address):
        nodes = cluster_nodes()
        found = find_node(node, nodes)
        # A name that the cordon is to have: the machine's, unless several nodes share it.
        name = node if node in (found.address, found.host) else stable_name(found, nodes)
        write_cordon(Cordon(node=name, reason=reason or "no reason given", by=operator(), at=datetime.now(UTC)))
        _audit("nodes.cordon", name, {"reason": reason, "drain": drain})
        console.print(f"{escape(name)} is cordoned: nothing new is placed on it.")
        if drain:
            from tandem.cluster.health.nodes import drain as drain_node

            drain_node(found, reason or "cordoned", deadline_s)
            console.print(f"It is drained, and leaves the cluster when idle or in {deadline_s:g} s.")
        _tell_of_apps(found, drained=drain)


def uncordon_command(node: NodeArgument) -> None:
    """Let a node have work again. A node that was drained has to be started again too."""
    with friendly_errors():
        exact = find_cordon(node, read_cordons()).node
        remove_cordon(exact)
        _audit("nodes.uncordon", exact, None)
        console.print(f"{escape(exact)} is not cordoned any more.")
        console.print(
            f"Apps that were deployed during the cordon stay away from it until {DEPLOY} has been run; jobs may use it from "
            "their next attempt on."
        )


def cordons_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the nodes that are kept out, with the reasons."""
    with friendly_errors():
        cordons = read_cordons()
        if as_json:
            rows = [
                {"node": each.node, "reason": each.reason, "by": each.by, "at": each.at.isoformat()}
                | {"automatic": each.automatic}
                for each in cordons
            ]
            console.print_json(json.dumps(rows))
            return
        if not cordons:
            console.print("No node is cordoned.")
            return
        table = Table("node", "since", "by", "reason", box=None, padding=(0, 1))
        for each in cordons:
            by = f"{each.by} (policy)" if each.automatic else each.by
            table.add_row(escape(each.node), f"{each.at:%Y-%m-%d %H:%M} UTC", escape(by), escape(each.reason))
        console.print(table)


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to the cluster whose nodes are meant, for the length of a block."""
    cluster = connect(address)
    if cluster is None:
        raise ClusterError(
            "No cluster runs here. Run this on a node of one, with RAY_ADDRESS set (`tandem node start` does), or give --address."
        )
    with connected(cluster):
        yield


def _audit(action: str, node: str, after: Mapping[str, object] | None) -> None:
    """Add an entry to the audit log. A registry that cannot be opened does not keep a bad node in."""
    with contextlib.suppress(TandemError):
        AuditLog.open().append([Change(by=operator(), action=action, target=node, after=after)])


def _tell_of_apps(node: ClusterNode, *, drained: bool) -> None:
    """Say what the apps that are up have on a node that has just been cordoned, and the next step."""
    from ray.serve.context import _get_global_client

    apps: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # without Serve there are none
        client = _get_global_client(raise_if_no_controller_running=False)
        apps = client.get_serve_details()["applications"] if client else {}
    if message := apps_message(apps, node.id, drained=drained):
        console.print(escape(message))


def apps_message(apps: Mapping[str, Any], node_id: str, *, drained: bool = False) -> str:
    """What a cordon means for the apps that are up, as Serve describes them; empty without apps. Pure."""
    if not apps:
        return ""
    if drained:
        return (
            f"Apps keep the nodes that they could use when they were deployed ({', '.join(sorted(apps))}): if this one is "
            f"started again, Serve may start a replica on it until {DEPLOY} has been run."
        )
    names = sorted(
        f"{app}/{deployment}"
        for app, details in apps.items()
        for deployment, state in details["deployments"].items()
        for replica in state["replicas"]
        if replica.get("node_id") == node_id
    )
    count = f"{len(names)} {'replica runs there and stays' if len(names) == 1 else 'replicas run there and stay'}"
    there = f"{count}: {', '.join(names)}." if names else "No replica runs there."
    return (
        f"{there} Apps keep the nodes that they could use when they were deployed ({', '.join(sorted(apps))}): Serve may start a "
        f"replica on this one until {DEPLOY} has been run, which starts their replicas anew."
    )
