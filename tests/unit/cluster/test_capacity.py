"""Whether a cluster could hold a replica ."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.cluster.capacity import check_nodes
from tandem.config.serving.replica import ReplicaConfig
from tandem.errors import ClusterError

BIG, GPUS = {"CPU": 16.0}, {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("nodes", "wanted", "said"),
    [
        (
            [GPUS, GPUS],
            {"gpus_per_replica": 4},
            "takes 4 GPU; the whole cluster has 4; the largest of 2 nodes has 2. Lower gpus",
        ),
        (
            [BIG, GPUS],
            {"gpus_per_replica": 1, "cpus_per_replica": 8},
            "8 CPU, 1 GPU, and no node has all.*: 16 CPU, 0 GPU; 4 CPU",
        ),
        (
            [BIG],
            {"resources_per_replica": {"fast": 1}},
            "takes 1 fast; the whole cluster has 0. Lower resources_per_replica",
        ),
        ([], {}, "takes 1 CPU; the whole cluster has 0. Lower cpus_per_replica"),
    ],
)
def test_replicas_that_no_node_could_hold_are_refused(nodes: Any, wanted: dict[str, Any], said: str) -> None:
    with pytest.raises(ClusterError, match=said):
        check_nodes(nodes, ReplicaConfig(**wanted))


def test_one_node_that_holds_a_replica_is_enough() -> None:
    check_nodes([BIG, GPUS], ReplicaConfig(gpus_per_replica=2, cpus_per_replica=4, replicas=9))
