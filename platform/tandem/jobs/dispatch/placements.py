"""Workers of jobs on nodes: where adopted runs are, and what a node has for jobs beside other work. Pure.

Ray chooses the nodes of a job's workers. The scheduler counts a run on the nodes that it chose; of one that it adopts, on nodes
where something runs. A run that Ray placed elsewhere counts on both until it ends: less is free than could be, never more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tandem.jobs.dispatch.decisions import NodeAmounts
from tandem.jobs.scheduling import Node
from tandem.jobs.scheduling.pool import Pool
from tandem.jobs.scheduling.records import Placement, Run
from tandem.jobs.scheduling.resources import Resources

UNKNOWN = "(unknown node)"
"""Holds the workers of an adopted run that no node has room for."""


def used_pool(nodes: Iterable[NodeAmounts], runs: Iterable[Run]) -> Pool:
    """What is used on each node, cordoned ones too, without these runs."""
    pool = Pool.of((node.id, node.total - node.free) for node in nodes)
    for run in runs:
        pool.take_all(run.placement, run.job.worker)
    return pool


def locate(worker: Resources, workers: int, used: Pool, free: Pool) -> Placement:
    """Likely nodes of a run that is there: those where the most is used by what is not known, then those with room.

    Takes the workers from the pools.
    """
    placed: dict[str, int] = {}
    for pool in (used, free):
        for node_id in sorted(pool.ids, key=lambda node_id: (-_fits(pool, node_id, worker), node_id)):
            count = min(_fits(pool, node_id, worker), workers - sum(placed.values()))
            if count > 0:
                placed[node_id] = placed.get(node_id, 0) + count
                pool.take(node_id, worker * count)
    if missing := workers - sum(placed.values()):
        placed[UNKNOWN] = missing
    return tuple(sorted(placed.items()))


def _fits(pool: Pool, node_id: str, worker: Resources) -> int:
    return Pool.of([(node_id, pool.free(node_id))]).slots(worker)


def nodes_for_jobs(nodes: Sequence[NodeAmounts], runs: Iterable[Run]) -> list[Node]:
    """The nodes that jobs may be placed on, with what is not used by serving or other work there.

    A run that starts does not use its placement yet, which would hide as much of what others use: what replicas hold is known.
    """
    others = used_pool(nodes, runs)
    found = []
    for node in nodes:
        if node.is_placeable:
            used = others.free(node.id)
            found.append(
                Node(
                    id=node.id,
                    cpus=node.total.cpus - max(0.0, used.cpus, node.serving.cpus),
                    gpus=node.total.gpus - max(0.0, used.gpus, node.serving.gpus),
                )
            )
    return found
