"""Number of workers of an elastic run: by the config's limits, and by the free resources of the nodes."""

from __future__ import annotations

import pytest

from tandem.config import DataConfig, ParallelismConfig, TrainConfig, check_elastic, with_workers, worker_counts
from tandem.config.load import from_dict, to_dict
from tandem.errors import ConfigError
from tandem.train.supervision.capacity import Node, max_workers


def elastic(least: int, most: int, *, batch_size: int = 8, accumulate: int = 1, **degrees: int) -> TrainConfig:
    parallel = ParallelismConfig(workers=most, min_workers=least, **degrees)
    return TrainConfig(
        name="a", data=DataConfig(path="x"), parallel=parallel, batch_size=batch_size, accumulate=accumulate
    )


def test_fewer_workers_take_the_same_batch_in_micro_batches_of_the_same_size():
    config = elastic(1, 4, batch_size=8, accumulate=2)
    assert worker_counts(config) == [1, 2, 4]
    assert [(n, with_workers(config, n).accumulate) for n in worker_counts(config)] == [(1, 8), (2, 4), (4, 2)]
    assert all(with_workers(config, n).batch_size == 8 for n in worker_counts(config))


def test_worker_counts_are_multiples_of_the_model_parallel_group():
    assert worker_counts(elastic(2, 8, tensor=2)) == [2, 4, 8]
    assert worker_counts(elastic(4, 8, batch_size=24, tensor=2, pipeline=2, accumulate=4)) == [4, 8]


def test_an_impossible_minimum_is_refused_with_the_possible_numbers():
    with pytest.raises(
        ConfigError, match=r"min is 3, but each worker of a group of 2 is needed. Set it to one of 2, 4"
    ):
        check_elastic(elastic(3, 4, tensor=2))
    with pytest.raises(ConfigError, match=r"min is 3, but batch_size \(8\) cannot be shared out"):
        check_elastic(elastic(3, 4))


def test_min_and_max_are_written_as_a_mapping_and_read_back():
    values = {"name": "a", "data": {"path": "x"}, "parallel": {"workers": {"min": 2, "max": 4}}}
    config = from_dict(TrainConfig, values)
    assert (config.parallel.workers, config.parallel.min_workers) == (4, 2)
    assert from_dict(TrainConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="both of min and max"):
        from_dict(TrainConfig, {**values, "parallel": {"workers": {"min": 2}}})


def test_capacity_counts_whole_tensor_groups_on_each_node():
    config = elastic(2, 8, tensor=2)
    assert max_workers([Node(id="a", cpus=3), Node(id="b", cpus=3)], config) == 4
    assert max_workers([Node(id="a", cpus=3), Node(id="b", cpus=3, draining=True)], config) == 2
    assert max_workers([Node(id="a", cpus=1.5), Node(id="b", cpus=1.5)], config) == 0
    # Reading the data needs a quarter of a CPU beside them.
    assert max_workers([Node(id="a", cpus=4)], elastic(1, 4)) == 2
    assert max_workers([Node(id="a", cpus=1)], elastic(1, 4), {"a": 3}) == 2
    assert max_workers([Node(id="a", cpus=1.25)], elastic(1, 4), {"a": 3}) == 4


def test_a_cordoned_node_has_no_room_even_for_the_workers_that_run_there():
    config = elastic(1, 4)
    nodes = [Node(id="a", cpus=2.25), Node(id="b", cpus=3, cordoned=True)]
    assert max_workers(nodes, config) == 2
    # Two run there now; the attempt that follows a stop to grow would not get them.
    assert max_workers(nodes, config, {"b": 2}) == 2
