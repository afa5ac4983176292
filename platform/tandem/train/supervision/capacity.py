"""How many workers the nodes of a cluster have room for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tandem.config import TrainConfig, worker_counts
from tandem.train.supervision.health import Heartbeat


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """What a node has left."""

    id: str
    cpus: float
    gpus: float = 0.0
    draining: bool = False
    """It will be taken away."""


def current_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to, and what is free on each."""
    # Ray says so nowhere else: its public interface knows the cluster as a whole.
    import ray
    from ray._private.state import available_resources_per_node, state

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    draining = set(state.get_draining_nodes() or ())
    return [
        Node(id=node, cpus=free.get("CPU", 0.0), gpus=free.get("GPU", 0.0), draining=node in draining)
        for node, free in available_resources_per_node().items()
        if node in alive
    ]


def max_workers(nodes: Iterable[Node], config: TrainConfig, ours: Mapping[str, int] | None = None) -> int:
    """The most workers that `config` may have and the nodes can hold, beside the reading of data; 0 if too few.

    `ours`: workers of this run that are on a node now, and so do not take anything from it.
    """
    parallel = config.parallel
    there, spare = 0, 0.0
    for node in nodes:
        if node.draining:
            continue
        here = (ours or {}).get(node.id, 0)
        cpus = node.cpus + here * parallel.cpus_per_worker
        gpus = node.gpus + here * parallel.gpus_per_worker
        each = ((cpus, parallel.cpus_per_worker), (gpus, parallel.gpus_per_worker))
        count = min((int((free + 1e-6) // needed) for free, needed in each if needed), default=parallel.workers)
        # A tensor group stays on one node.
        count -= count % parallel.tensor
        there += count
        spare += cpus - count * parallel.cpus_per_worker
    possible = [
        size
        for size in worker_counts(config)
        if size <= there and spare + (there - size) * parallel.cpus_per_worker + 1e-6 >= config.data.readers
    ]
    return max(possible, default=0)


def workers_by_node(heartbeats: Sequence[Heartbeat]) -> Counter[str]:
    """How many of the workers are on each node."""
    return Counter(heartbeat.node for heartbeat in heartbeats if heartbeat.phase != "done")
