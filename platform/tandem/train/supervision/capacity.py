"""Cluster capacity: how many workers of a run the free resources of the nodes can hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tandem.cluster.health.cordons import cordoned_ids
from tandem.config import TrainConfig, worker_counts
from tandem.train.supervision.heartbeat import Heartbeat


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """Free resources of a node."""

    id: str
    cpus: float
    gpus: float = 0.0
    draining: bool = False
    """The cluster is about to remove it."""
    cordoned: bool = False
    """No new worker is placed on it; those that run there stay until the attempt ends."""


def current_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to, with their free resources."""
    # Private modules: Ray's public interface knows the resources of the whole cluster only.
    import ray
    from ray._private.state import available_resources_per_node, state

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    draining, cordoned = set(state.get_draining_nodes() or ()), cordoned_ids()
    return [
        Node(
            id=node,
            cpus=resources.get("CPU", 0.0),
            gpus=resources.get("GPU", 0.0),
            draining=node in draining,
            cordoned=node in cordoned,
        )
        for node, resources in available_resources_per_node().items()
        if node in alive
    ]


def max_workers(nodes: Iterable[Node], config: TrainConfig, own_workers: Mapping[str, int] | None = None) -> int:
    """The largest allowed number of workers that the nodes can hold, beside the tasks that read data; 0 if none fits.

    `own_workers`: workers of this run by node id; their resources count as free. The next attempt places none on nodes that are
    draining or cordoned, so these hold nothing, whatever runs there.
    """
    parallel = config.parallel
    capacity, spare_cpus = 0, 0.0
    for node in nodes:
        if node.draining or node.cordoned:
            continue
        own_workers_here = (own_workers or {}).get(node.id, 0)
        cpus = node.cpus + own_workers_here * parallel.cpus_per_worker
        gpus = node.gpus + own_workers_here * parallel.gpus_per_worker
        free_and_needed = ((cpus, parallel.cpus_per_worker), (gpus, parallel.gpus_per_worker))
        node_capacity = min(
            (int((free + 1e-6) // needed) for free, needed in free_and_needed if needed), default=parallel.workers
        )
        # A tensor group stays on one node.
        node_capacity -= node_capacity % parallel.tensor
        capacity += node_capacity
        spare_cpus += cpus - node_capacity * parallel.cpus_per_worker
    possible_counts = [
        count
        for count in worker_counts(config)
        if count <= capacity
        and spare_cpus + (capacity - count) * parallel.cpus_per_worker + 1e-6 >= config.data.readers
    ]
    return max(possible_counts, default=0)


def workers_by_node(heartbeats: Sequence[Heartbeat]) -> Counter[str]:
    """Number of running workers by node id."""
    return Counter(heartbeat.node for heartbeat in heartbeats if heartbeat.phase != "done")
