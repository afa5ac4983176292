"""GPUs are counted before a local cluster is started."""

from __future__ import annotations

import pytest

from tandem.cluster.local import Cluster
from tandem.errors import ClusterError
from tandem.sdk import cluster


def test_more_gpus_than_this_machine_has_are_refused_before_a_cluster_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "gpus", lambda: ["a GPU"])
    cluster.check_gpus(1.0, "The job", "parallel.workers")
    with pytest.raises(
        ClusterError, match=r"The job needs 2 GPUs, and this machine has 1\. Lower parallel\.workers, or set"
    ):
        cluster.check_gpus(2.0, "The job", "parallel.workers")


def test_a_cluster_that_is_up_checks_its_resources_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: Cluster(dashboard_url="http://head.example:8265"))
    monkeypatch.setattr(cluster, "gpus", list)
    cluster.check_gpus(2.0, "The job", "parallel.workers")
