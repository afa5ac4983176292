"""The health of every node of the connected Ray cluster: one task on each, with a time limit of its own."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tandem.cluster.health.collect import clock, collect
from tandem.cluster.health.cordons import (
    ClusterNode,
    Cordon,
    cluster_nodes,
    cordon_of,
    read_cordons,
    stable_name,
    uncordoned_at,
    write_cordon,
)
from tandem.cluster.health.policy import Decision, decide
from tandem.cluster.health.report import Finding, NodeReport, Severity
from tandem.cluster.health.serving import check_serving
from tandem.errors import ClusterError
from tandem.settings import child_environment

TIMEOUT_S = 90.0
"""Seconds that a node has for its report: its tools have limits of their own, of which some may be reached."""
SERVING_TIMEOUT_S = 20.0
GCS_TIMEOUT_S = 10.0
RECENT_LOSS_S = 600.0
"""Seconds for which a lost node counts as bad. Ray lists dead nodes for long, and a machine may have been taken away for good."""
CLOCK_TRIES, CLOCK_TIMEOUT_S = 3, 10.0
MAX_OFFSET_S, MAX_NOTED_OFFSET_S = 5.0, 0.5
"""A clock that is further off fails tokens and certificates; a smaller difference makes logs hard to read."""


def examine(timeout_s: float = TIMEOUT_S) -> list[NodeReport]:
    """A report of every node that is alive, and of those that went without being told to; by address."""
    nodes, cordons = cluster_nodes(), read_cordons()
    alive = [node for node in nodes if node.alive]
    answers = _on_each(alive, lambda node: (collect, node.id, node.address, uncordoned_at(node)), timeout_s)
    reports = [
        answer.with_findings(_time(node)) if isinstance(answer, NodeReport) else _silent(node, answer)
        for node, answer in zip(alive, answers, strict=True)
    ]
    reports += lost_nodes(nodes, _loss_times(), time.time())
    by_id = {node.id: cordon for node in nodes if (cordon := cordon_of(node, cordons)) is not None}
    reports = [
        replace(report, cordon=by_id[report.node_id].reason) if report.node_id in by_id else report
        for report in differences(reports)
    ]
    return sorted(reports, key=lambda report: (report.address, report.node_id))


def examine_serving(drain_timeout_s: float) -> list[tuple[ClusterNode, Finding]]:
    """What serving lacks on each node: findings that are not ok. Nodes that do not answer in time are left out."""
    alive = [node for node in cluster_nodes() if node.alive]
    answers = _on_each(alive, lambda node: (serving_here, drain_timeout_s), SERVING_TIMEOUT_S)
    return [
        (node, finding)
        for node, answer in zip(alive, answers, strict=True)
        if isinstance(answer, list)
        for finding in answer
        if finding.severity != "ok"
    ]


def serving_here(drain_timeout_s: float) -> list[Finding]:
    """The findings about serving on this machine, from the environment of Ray's processes."""
    return check_serving(child_environment(), drain_timeout_s=drain_timeout_s)


def apply_policy(reports: Sequence[NodeReport], kinds: frozenset[str], by: str) -> Decision:
    """Cordon the nodes that a policy cordons. `by`: who looked."""
    decision = decide(reports, kinds)
    nodes = cluster_nodes()
    for report, finding in decision.cordon:
        node = ClusterNode(id=report.node_id, address=report.address, host=report.host)
        reason = f"{finding.kind}: {finding.says}"
        write_cordon(Cordon(node=stable_name(node, nodes), reason=reason, by=by, at=datetime.now(UTC), automatic=True))
    return decision


def drain(node: ClusterNode, reason: str, deadline_s: float) -> None:
    """Tell Ray to place nothing more on a node, to move off what it can, and to let it go when it is idle or after `deadline_s`.

    ClusterError for the head, which cannot go, and where Ray refuses.
    """
    if node.is_head:
        raise ClusterError(
            f"{node.address} is the cluster's head, which cannot be drained. Without --drain it is cordoned only."
        )
    from ray.core.generated import autoscaler_pb2

    reasons = autoscaler_pb2.DrainNodeReason  # type: ignore[attr-defined]
    raylet: Any = ray._raylet
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why = client.drain_node(
        node.id,
        reasons.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason,
        int(1000 * (time.time() + deadline_s)),
    )
    if not accepted:
        raise ClusterError(f"Ray does not drain {node.address}: {why}")


def differences(reports: Sequence[NodeReport]) -> list[NodeReport]:
    """The reports, with findings about facts in which a node differs from most nodes with the same GPUs. Pure."""
    alike: dict[str, list[NodeReport]] = defaultdict(list)
    for report in reports:
        alike[report.facts.get("GPU", "")].append(report)
    found: dict[str, list[Finding]] = defaultdict(list)
    for group in alike.values():
        for name in sorted({name for report in group for name in report.facts} - {"GPU"}):
            values = Counter(report.facts.get(name, "not set") for report in group)
            usual, count = values.most_common(1)[0]
            for report in group:
                if (value := report.facts.get(name, "not set")) != usual:
                    found[report.node_id].append(_difference(name, value, usual, count))
    return [report.with_findings(*found[report.node_id]) for report in reports]


def lost_nodes(nodes: Sequence[ClusterNode], lost_at: Mapping[str, float], now: float) -> list[NodeReport]:
    """Reports of the nodes that went without being told to and whose address has no other node now. Pure.

    A loss of the last RECENT_LOSS_S seconds is bad, and so is one of unknown time; an older one is a warning. `lost_at`: seconds
    since 1970, by node id.
    """
    addresses = {node.address for node in nodes if node.alive}
    found = []
    for node in nodes:
        if node.alive or not node.died_unexpectedly or node.address in addresses:
            continue
        age_s = now - lost_at.get(node.id, now)
        when = f" {age_s / 60:.0f} minutes ago" if node.id in lost_at else ""
        severity: Severity = "bad" if age_s <= RECENT_LOSS_S else "warning"
        found.append(replace(_silent(node, f"Ray has lost it{when}", severity), alive=False))
    return found


def _loss_times() -> dict[str, float]:
    """When Ray lost each node that is dead, in seconds since 1970, by node id; empty if Ray does not tell."""
    raylet: Any = ray._raylet
    with contextlib.suppress(Exception):  # not part of Ray's public interface
        client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        infos = client.get_all_node_info(timeout=GCS_TIMEOUT_S).values()
        return {info.node_id.hex(): info.end_time_ms / 1000 for info in infos if info.end_time_ms}
    return {}


def _difference(name: str, value: str, usual: str, count: int) -> Finding:
    return Finding(
        kind="difference",
        severity="warning",
        says=f"{name} is {value}; on {count} {'node' if count == 1 else 'nodes'} with the same GPUs it is {usual}",
        fix="Make them alike: a training run spans nodes, and its ranks must agree.",
        values={"name": name, "value": value, "usual": usual},
    )


def _silent(node: ClusterNode, why: object, severity: Severity = "bad") -> NodeReport:
    finding = Finding(
        kind="node_silent",
        severity=severity,
        says=f"no report: {why}",
        fix="Look at the machine: whether it runs and is reached, and whether this Tandem is installed there.",
    )
    return NodeReport(node_id=node.id, address=node.address, host=node.host, findings=(finding,))


def _time(node: ClusterNode) -> Finding:
    """The node's clock beside that of this machine, from the fastest of a few round trips."""
    trips: list[tuple[float, float]] = []
    for _ in range(CLOCK_TRIES):
        sent = time.time()
        (answer,) = _on_each([node], lambda each: (clock,), CLOCK_TIMEOUT_S)
        if isinstance(answer, float):
            received = time.time()
            trips.append((received - sent, answer - (sent + received) / 2))
    if not trips:
        fix = "Run `tandem doctor --cluster` again when the node has less to do."
        return Finding(kind="time", severity="warning", says="the clock could not be compared", fix=fix)
    return time_finding(*min(trips))


def time_finding(round_trip_s: float, offset_s: float) -> Finding:
    """The finding for a clock that is `offset_s` ahead, known to half a round trip. Pure."""
    certain_s = max(0.0, abs(offset_s) - round_trip_s / 2)
    way = "ahead of" if offset_s > 0 else "behind"
    says = f"its clock is {abs(offset_s):.3f} s {way} this machine's, give or take {round_trip_s / 2:.3f} s"
    fix = "Run a time service there (chrony, systemd-timesyncd)."
    values = {"offset_s": offset_s, "round_trip_s": round_trip_s}
    if certain_s > MAX_OFFSET_S:
        return Finding(kind="time", severity="bad", says=says, fix=fix, values=values)
    if certain_s > MAX_NOTED_OFFSET_S:
        return Finding(kind="time", severity="warning", says=says, fix=fix, values=values)
    return Finding(kind="time", severity="ok", says=says, values=values)


def _on_each(
    nodes: Sequence[ClusterNode], call: Callable[[ClusterNode], tuple[Any, ...]], timeout_s: float
) -> list[Any]:
    """Results of a function on each node, at the same time; for a node without one the reason, as text.

    `call`: the function and its arguments for a node.
    """
    tasks = []
    for node in nodes:
        function, *arguments = call(node)
        # No CPU: training may occupy the whole node.
        strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
        tasks.append(
            ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(*arguments)
        )
    ray.wait(tasks, num_returns=len(tasks), timeout=timeout_s)
    results: list[Any] = []
    for task in tasks:
        try:
            results.append(ray.get(task, timeout=0))
        except ray.exceptions.GetTimeoutError:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.cancel(task, force=True)
            results.append(f"it has not answered within {timeout_s:g} s")
        except ray.exceptions.RayError as error:
            results.append(str(error).strip().splitlines()[-1])
    return results
