"""What the driver refuses before anything starts."""

from __future__ import annotations

import pytest

from tandem.config import DataConfig, ParallelismConfig, TrainConfig
from tandem.errors import ClusterError
from tandem.train.launch import check_room


def config(**parallel: float) -> TrainConfig:
    return TrainConfig(name="a", data=DataConfig(path="x"), parallel=ParallelismConfig(**parallel), batch_size=24)


def test_workers_that_the_whole_cluster_cannot_hold_are_refused_with_the_numbers():
    with pytest.raises(
        ClusterError, match=r"3 workers of 1 CPU each, and 0.25 to read the data need 3.25 CPU; .* has 3"
    ):
        check_room(config(workers=3), {"CPU": 3.0})
    with pytest.raises(ClusterError, match="2 GPU; the whole cluster has 0"):
        check_room(config(workers=2, gpus_per_worker=1), {"CPU": 8.0})


def test_workers_that_fit_are_not():
    check_room(config(workers=3), {"CPU": 4.0})
    check_room(config(workers=2, gpus_per_worker=1), {"CPU": 8.0, "GPU": 2.0})
