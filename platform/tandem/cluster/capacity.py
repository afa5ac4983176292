"""Capacity check: whether the nodes of a cluster could hold a replica if they were empty. Pure.

How many replicas fit is not asked: those that do not wait, and the others have all rows meanwhile. Readers reserve nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem.config.serving.replica import ReplicaConfig
from tandem.errors import ClusterError


def check_nodes(nodes: Sequence[Mapping[str, float]], config: ReplicaConfig, replica: str = "A replica") -> None:
    """ClusterError if no node could hold a replica: Ray would wait for ever.

    `nodes`: resources of those that are alive; `replica`: its name in the message.
    """
    needed = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica, **config.resources_per_replica}
    for name, each in needed.items():
        have = [node.get(name, 0.0) for node in nodes]
        if each > max(have, default=0.0):
            largest = f"; the largest of {len(nodes)} nodes has {max(have):g}" if sum(have) >= each else ""
            setting = f"{name.lower()}s_per_replica" if name in ("CPU", "GPU") else "resources_per_replica"
            raise ClusterError(
                f"{replica} takes {each:g} {name}; the whole cluster has {sum(have):g}{largest}. Lower {setting}, or add a node."
            )
    if not any(all(each <= node.get(name, 0.0) for name, each in needed.items()) for node in nodes):
        takes = _listed(needed, needed)
        raise ClusterError(
            f"{replica} takes {takes}, and no node has all of it: {'; '.join(_listed(needed, node) for node in nodes[:5])}. "
            "Lower what it takes, or add a node."
        )


def _listed(names: Mapping[str, float], of: Mapping[str, float]) -> str:
    return ", ".join(f"{of.get(name, 0.0):g} {name}" for name, each in names.items() if each)
