"""The cluster as its scheduler sees it: CPUs and GPUs of each node, and replicas that Serve has no room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from tandem.cluster.health.cordons import cluster_nodes, cordon_of, read_cordons
from tandem.errors import ClusterError, sentence
from tandem.jobs.dispatch.decisions import Capacity, NodeAmounts
from tandem.jobs.scheduling import Resources, ServingDemand

PLACED_WITHIN_S = 10.0
"""Seconds that a replica may take to say where it is, once Ray has placed it: its process starts and imports first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """Replicas of all apps at one moment."""

    pending: tuple[ServingDemand, ...] = ()
    """Those that are wanted and have no place, by app and model."""
    placed: Mapping[str, Resources] = field(default_factory=dict)
    """What the others hold, by node."""


class ReplicaSource(Protocol):
    """Tells the replicas."""

    def __call__(self) -> Replicas:
        """Those of now."""


class ServeReplicas:
    """`ReplicaSource` of Ray Serve: what its controller has asked for, placed by Ray or not."""

    def __init__(self, level: int, details: Callable[[], Mapping[str, Any]] | None = None) -> None:
        """`level`: of serving, compared with the levels of jobs' priority classes. `details`: of Serve's instance, as its
        controller gives them.
        """
        self._level = level
        self._details = details or serve_details

    def __call__(self) -> Replicas:
        """See `ReplicaSource`."""
        details = self._details()
        pending = pending_replicas(details, time.time(), self._level)
        return Replicas(pending=tuple(pending), placed=placed_replicas(details))


def serve_details() -> Mapping[str, Any]:
    """What Serve's controller says of all apps; empty where Serve does not run."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return client.get_serve_details() if client is not None else {}


def pending_replicas(details: Mapping[str, Any], now: float, level: int) -> list[ServingDemand]:
    """Replicas that have waited for a place for more than PLACED_WITHIN_S, by app and deployment. `now`: seconds since 1970."""
    found = []
    for app, application in (details.get("applications") or {}).items():
        for name, deployment in (application.get("deployments") or {}).items():
            pending = [
                replica
                for replica in deployment.get("replicas") or ()
                if str(_value(replica["state"])) == "STARTING"
                and replica.get("node_id") is None
                and now - replica["start_time_s"] > PLACED_WITHIN_S
            ]
            replica_resources = _resources(deployment)
            if pending and not replica_resources.is_empty:
                found.append(
                    ServingDemand(app=app, model=name, replicas=len(pending), replica=replica_resources, priority=level)
                )
    return found


def placed_replicas(details: Mapping[str, Any]) -> dict[str, Resources]:
    """What replicas hold on each node; a replica of several workers counts on the node of its first one."""
    placed: dict[str, Resources] = {}
    for application in (details.get("applications") or {}).values():
        for deployment in (application.get("deployments") or {}).values():
            of_each = _resources(deployment)
            for replica in deployment.get("replicas") or ():
                if (node_id := replica.get("node_id")) is not None:
                    placed[node_id] = placed.get(node_id, Resources()) + of_each
    return placed


def _value(state: Any) -> Any:
    return getattr(state, "value", state)


def _resources(deployment: Mapping[str, Any]) -> Resources:
    """Of one replica: of its placement group where it has one, else of its actor."""
    bundles = (deployment.get("deployment_config") or {}).get("placement_group_bundles")
    amounts = bundles or [deployment.get("required_resources") or {}]
    return Resources(
        sum(float(each.get("CPU", 0.0)) for each in amounts), sum(float(each.get("GPU", 0.0)) for each in amounts)
    )


def node_amounts() -> tuple[NodeAmounts, ...]:
    """The nodes of the connected cluster that are alive. No new work is placed on those that are cordoned or drain."""
    # Private modules: Ray's public interface knows the resources of the whole cluster only.
    from ray._private.state import available_resources_per_node, state

    cordons, free = read_cordons(), available_resources_per_node()
    draining = set(state.get_draining_nodes() or ())
    return tuple(
        NodeAmounts(
            id=node.id,
            total=_amounts(node.resources or {}),
            free=_amounts(free.get(node.id, {})),
            is_placeable=node.id not in draining and cordon_of(node, cordons) is None,
            node_type=node.node_type,
        )
        for node in cluster_nodes()
        if node.alive
    )


def capacity(source: ReplicaSource) -> Capacity:
    """What the connected cluster has for jobs, by node, and what serving lacks. ClusterError where it does not answer."""
    try:
        # The nodes first: without a cluster, Serve's client would start one.
        nodes, replicas = node_amounts(), source()
    except (RayError, RayServeException, ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"The cluster's resources are not known: {sentence(str(error))} They are asked again."
        ) from error
    nodes = tuple(replace(node, serving=replicas.placed.get(node.id, Resources())) for node in nodes)
    return Capacity(
        cpus=sum(node.total.cpus for node in nodes),
        gpus=sum(node.total.gpus for node in nodes),
        nodes=nodes,
        pending_replicas=replicas.pending,
    )


def _amounts(resources: Mapping[str, float]) -> Resources:
    return Resources(float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0)))
