"""The policy that cordons nodes without a person, and the nodes that Ray has lost."""

from __future__ import annotations

import pytest

from tandem.cluster.health.cordons import ClusterNode
from tandem.cluster.health.nodes import RECENT_LOSS_S, lost_nodes
from tandem.cluster.health.policy import decide, parse_kinds
from tandem.cluster.health.report import KINDS, Finding, NodeReport
from tandem.errors import ConfigError

XID = frozenset({"gpu_xid"})


def bad(node: str, kind: str = "gpu_xid", *, alive: bool = True, cordon: str | None = None) -> NodeReport:
    finding = Finding(kind=kind, severity="bad", says="x", fix="y")
    return NodeReport(node_id=node, address=node, host=node, findings=(finding,), alive=alive, cordon=cordon)


def dead(node: str, address: str) -> ClusterNode:
    return ClusterNode(id=node, address=address, host=address, alive=False, died_unexpectedly=True)


def test_dead_nodes_do_not_raise_the_number_of_nodes_that_may_be_cordoned() -> None:
    gone = [bad(f"dead-{index}", "node_silent", alive=False) for index in range(8)]
    decision = decide([bad("a"), bad("b"), *gone], XID)
    assert len(decision.cordon) == 1 and len(decision.spared) == 1


def test_cordoned_dead_nodes_do_not_use_up_the_limit() -> None:
    gone = [bad(f"dead-{index}", alive=False, cordon="known") for index in range(8)]
    assert len(decide([bad("a"), bad("b"), *gone], XID).cordon) == 1


def test_a_dead_node_is_never_cordoned() -> None:
    decision = decide([bad("a", alive=False), bad("b", alive=False)], frozenset(KINDS))
    assert decision.cordon == () and decision.spared == ()


def test_a_policy_on_silent_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="TANDEM_CORDON_ON names node_silent, which is reported and cordons no node"):
        parse_kinds("gpu_xid, node_silent")


def test_a_node_lost_long_ago_is_a_warning_and_a_recent_loss_is_bad() -> None:
    nodes = [dead("old", "10.0.0.2"), dead("new", "10.0.0.3"), dead("unknown", "10.0.0.4")]
    now = 10_000.0
    found = lost_nodes(nodes, {"old": now - RECENT_LOSS_S - 60, "new": now - 60}, now)
    assert [(each.node_id, each.severity, each.alive) for each in found] == [
        ("old", "warning", False), ("new", "bad", False), ("unknown", "bad", False),
    ]  # fmt: skip
    assert found[0].findings[0].says == "no report: Ray has lost it 11 minutes ago"


def test_a_lost_node_whose_address_has_another_node_is_left_out() -> None:
    again = ClusterNode(id="again", address="10.0.0.2", host="h2")
    told = ClusterNode(id="told", address="10.0.0.5", host="h5", alive=False)
    assert lost_nodes([dead("old", "10.0.0.2"), again, told], {}, 0.0) == []
