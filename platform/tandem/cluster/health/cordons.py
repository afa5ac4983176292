"""Cordons: nodes on which nothing new is placed. One file each below TANDEM_HOME, which all nodes of a cluster share.

A cordon names a machine (IP address or host name), and holds when Ray has been started there again; or one Ray node by its id.
Replicas and workers get a label selector that leaves out the nodes which are cordoned when they are placed. What runs stays.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tandem.errors import ClusterError, did_you_mean
from tandem.private import make_shared_folder
from tandem.settings import settings
from tandem.storage import write_atomic

NODE_ID_LABEL = "ray.io/node-id"
"""Label that Ray gives each node."""
NODE_ID = re.compile(r"[0-9a-f]{56}")
UNCORDONED = ".uncordoned"
"""End of the name of the file that holds when a node's cordon was last removed: what its logs said before is settled."""
NODE_TYPE_LABELS = ("ray.io/node-group", "ray.io/accelerator-type")
"""Labels of Ray that tell nodes of different types apart."""
MIN_PREFIX = 8
"""Characters of a node's id that are enough to name it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterNode:
    """A node of the cluster as Ray lists it."""

    id: str
    address: str
    host: str
    alive: bool = True
    is_head: bool = False
    died_unexpectedly: bool = False
    resources: Mapping[str, float] | None = None
    node_type: str = ""
    """Its group, where Ray's autoscaler made it, else its type of accelerator; empty: it has neither."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cordon:
    """One cordon."""

    node: str
    """IP address, host name or Ray's id of the node."""
    reason: str
    by: str
    """`user@host` of the command, or the job whose policy set it."""
    at: datetime
    automatic: bool = False
    """Whether a policy set it."""

    def covers(self, node: ClusterNode) -> bool:
        """Whether it is about this node."""
        return self.node in (node.id, node.address, node.host)


def cordons_folder() -> Path:
    """Where the files lie."""
    return settings().root / "cordons"


def read_cordons() -> tuple[Cordon, ...]:
    """All cordons of this home, by node. A file that is no cordon is left out."""
    found = []
    for path in sorted(cordons_folder().glob("*.json")):
        try:
            values = json.loads(path.read_text())
            found.append(Cordon(**{**values, "at": datetime.fromisoformat(values["at"])}))
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return tuple(found)


def write_cordon(cordon: Cordon) -> None:
    """Make a cordon, or replace that of the same node."""
    make_shared_folder(cordons_folder(), settings().root)
    content = json.dumps({**asdict(cordon), "at": cordon.at.isoformat()}, indent=2)
    write_atomic(_path(cordon.node), content + "\n")


def remove_cordon(node: str) -> bool:
    """Remove a cordon by the name that it has, and keep the time; False: there is none."""
    try:
        _path(node).unlink()
    except FileNotFoundError:
        return False
    write_atomic(_path(node, UNCORDONED), datetime.now(UTC).isoformat() + "\n")
    return True


def uncordoned_at(node: ClusterNode) -> datetime | None:
    """When a cordon of this node was last removed; None: never, or the file cannot be read."""
    times = []
    for name in (node.id, node.address, node.host):
        with contextlib.suppress(OSError, ValueError):
            times.append(datetime.fromisoformat(_path(name, UNCORDONED).read_text().strip()))
    return max(times, default=None)


def _path(node: str, suffix: str = ".json") -> Path:
    return cordons_folder() / f"{quote(node, safe='')}{suffix}"


def find_node(name: str, nodes: Sequence[ClusterNode]) -> ClusterNode:
    """The node that a person names by address, host name, or the first characters of its id.

    ClusterError if there is none, or if several fit.
    """
    alive = [node for node in nodes if node.alive]
    named = [node for node in alive if name in (node.address, node.host, node.id)]
    named = named or [node for node in alive if len(name) >= MIN_PREFIX and node.id.startswith(name)]
    known = [known for node in alive for known in (node.address, node.host)]
    if not named:
        there = ", ".join(f"{node.address} ({node.host}, {node.id[:MIN_PREFIX]})" for node in alive[:20])
        raise ClusterError(f"No node of the cluster is {name!r}.{did_you_mean(name, known)} There are: {there}.")
    if len(named) > 1:
        ids = ", ".join(node.id[:MIN_PREFIX] for node in named)
        raise ClusterError(f"{len(named)} nodes are {name!r}; name one by its id: {ids}.")
    return named[0]


def find_cordon(name: str, cordons: Sequence[Cordon]) -> Cordon:
    """The cordon that a person names as it is listed, or by the start of a node's id; ClusterError if there is none."""
    found = [each for each in cordons if each.node == name]
    # Addresses are not to be shortened: 10.0.0.1 is the start of 10.0.0.12.
    if not found and len(name) >= MIN_PREFIX:
        found = [each for each in cordons if NODE_ID.fullmatch(each.node) and each.node.startswith(name)]
    if len(found) != 1:
        there = ", ".join(each.node for each in cordons) or "none"
        raise ClusterError(f"{len(found)} cordons are named {name!r}. Cordoned are: {there}.")
    return found[0]


def stable_name(node: ClusterNode, nodes: Iterable[ClusterNode]) -> str:
    """The node's address; its id where several nodes have that address, as those of one machine do."""
    shared = sum(each.address == node.address for each in nodes if each.alive) > 1
    return node.id if shared else node.address


def cordon_of(node: ClusterNode, cordons: Iterable[Cordon]) -> Cordon | None:
    """The cordon that covers a node."""
    return next((cordon for cordon in cordons if cordon.covers(node)), None)


def selector_without(node_ids: Iterable[str]) -> dict[str, str]:
    """Label selector of all nodes but these; empty, which selects all, without any."""
    ids = sorted(node_ids)
    return {NODE_ID_LABEL: f"!in({','.join(ids)})"} if ids else {}


def placement_selector() -> dict[str, str]:
    """Label selector for what is placed now on the connected cluster; empty without cordons, or without a cluster.

    ClusterError if every node is cordoned: Ray would wait without a limit.
    """
    import ray

    cordons = read_cordons()
    if not cordons or not ray.is_initialized():
        return {}
    alive = [node for node in cluster_nodes() if node.alive]
    kept_out = [node.id for node in alive if cordon_of(node, cordons) is not None]
    if alive and len(kept_out) == len(alive):
        raise ClusterError(
            f"All nodes of the cluster ({len(alive)}) are cordoned; `tandem cluster cordons` shows why. Add a node, or let one "
            "in again by `tandem cluster uncordon`."
        )
    return selector_without(kept_out)


def placeable_nodes() -> list[ClusterNode]:
    """The nodes of the connected cluster that are alive and not cordoned."""
    cordons = read_cordons()
    return [node for node in cluster_nodes() if node.alive and cordon_of(node, cordons) is None]


def placeable_resources() -> list[Mapping[str, float]]:
    """Resources of each of these nodes."""
    return [node.resources or {} for node in placeable_nodes()]


def total(resources: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of the resources of several nodes."""
    sums: dict[str, float] = {}
    for each in resources:
        for name, amount in each.items():
            sums[name] = sums.get(name, 0.0) + amount
    return sums


def cordoned_ids() -> frozenset[str]:
    """Ray's ids of the nodes of the connected cluster that are cordoned."""
    cordons = read_cordons()
    if not cordons:
        return frozenset()
    return frozenset(node.id for node in cluster_nodes() if cordon_of(node, cordons) is not None)


def cluster_nodes() -> list[ClusterNode]:
    """The nodes of the connected cluster, dead ones too."""
    import ray

    return [_node(entry) for entry in ray.nodes()]


def _node(entry: Mapping[str, Any]) -> ClusterNode:
    resources, labels = entry.get("Resources") or {}, entry.get("Labels") or {}
    return ClusterNode(
        id=entry["NodeID"],
        address=entry["NodeManagerAddress"],
        host=entry.get("NodeManagerHostname") or entry["NodeManagerAddress"],
        alive=bool(entry["Alive"]),
        is_head="node:__internal_head__" in resources,
        died_unexpectedly=str(entry.get("DeathReason", "")) in UNEXPECTED,
        resources=resources,
        node_type=next((str(labels[name]) for name in NODE_TYPE_LABELS if labels.get(name)), ""),
    )


UNEXPECTED = ("2", "UNEXPECTED_TERMINATION")
"""Ray's reason for a node that went without being told to."""
