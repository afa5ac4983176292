"""Capacity check: whether the nodes of a cluster could hold a replica if they were empty. Pure.

It does not check how many replicas fit: replicas without room wait, while the others process all rows. Readers reserve nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem.config.serving.replica import ReplicaConfig
from tandem.errors import ClusterError


def check_nodes(nodes: Sequence[Mapping[str, float]], config: ReplicaConfig, replica: str = "A replica") -> None:
    """ClusterError if no node could hold a replica: Ray would wait for ever.

    `nodes`: resources of those that are alive; `replica`: its name in the message.
    """
    required = {"CPU": config.cpus_per_replica, "GPU": config.gpus_per_replica, **config.resources_per_replica}
    for name, amount in required.items():
        amounts = [node.get(name, 0.0) for node in nodes]
        if amount > max(amounts, default=0.0):
            largest = f"; the largest of {len(nodes)} nodes has {max(amounts):g}" if sum(amounts) >= amount else ""
            setting = f"{name.lower()}s_per_replica" if name in ("CPU", "GPU") else "resources_per_replica"
            raise ClusterError(
                f"{replica} takes {amount:g} {name}; the whole cluster has {sum(amounts):g}{largest}. "
                f"Lower {setting}, or add a node."
            )
    if not any(all(amount <= node.get(name, 0.0) for name, amount in required.items()) for node in nodes):
        node_texts = "; ".join(_format_resources(required, node) for node in nodes[:5])
        raise ClusterError(
            f"{replica} takes {_format_resources(required, required)}, and no node has all of it: {node_texts}. "
            "Lower what it takes, or add a node."
        )


def _format_resources(required: Mapping[str, float], amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amounts.get(name, 0.0):g} {name}" for name, amount in required.items() if amount)
