"""Serve's demand for replicas, from what its controller says."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.common import ReplicaState

from tandem.apps.cluster_view import PLACED_WITHIN_S, Replicas, ServeReplicas, pending_replicas, placed_replicas
from tandem.jobs.scheduling import Resources, ServingDemand

NOW = 1_700_000_000.0


def replica(state: str, age_s: float = 60.0, node: str | None = None) -> dict[str, Any]:
    return {"state": ReplicaState(state), "start_time_s": NOW - age_s, "node_id": node}


def details(*replicas: dict[str, Any], **deployment: Any) -> dict[str, Any]:
    values = {"required_resources": {"CPU": 1.0, "GPU": 2.0}, "replicas": list(replicas), **deployment}
    return {"applications": {"app": {"deployments": {"model": values}}}}


def test_replicas_without_a_node_are_demand_once_ray_had_time_to_place_them() -> None:
    found = pending_replicas(
        details(
            replica("STARTING"),
            replica("STARTING"),
            replica("STARTING", node="n1"),
            replica("STARTING", age_s=PLACED_WITHIN_S),
            replica("RUNNING", node="n1"),
            replica("STOPPING"),
        ),
        NOW,
        100,
    )
    assert found == [ServingDemand(app="app", model="model", replicas=2, replica=Resources(1.0, 2.0), priority=100)]


def test_a_replica_of_several_workers_needs_its_whole_placement_group() -> None:
    bundles = [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0, "memory": 100.0}]
    (found,) = pending_replicas(
        details(replica("STARTING"), deployment_config={"placement_group_bundles": bundles}), NOW, 1
    )
    assert found.replica == Resources(1.0, 3.0)


@pytest.mark.parametrize(
    "serve_says",
    [{}, {"applications": {}}, details(), details(replica("STARTING"), required_resources={"memory": 1.0})],
)
def test_without_pending_replicas_of_cpus_or_gpus_there_is_no_demand(serve_says: dict[str, Any]) -> None:
    assert ServeReplicas(100, lambda: serve_says)() == Replicas()


def test_replicas_with_a_node_hold_their_resources_there() -> None:
    says = details(*(replica("RUNNING", node=node) for node in ("n1", "n1", "n2")), replica("STARTING"))
    assert placed_replicas(says) == {"n1": Resources(2.0, 4.0), "n2": Resources(1.0, 2.0)}
