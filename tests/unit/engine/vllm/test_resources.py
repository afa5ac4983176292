"""Resources of vLLM replicas, and errors for degrees that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.config import ServedModelConfig
from tandem.engine.vllm.resources import check_nodes, placement
from tandem.errors import ConfigError, EngineError


def served(gpus: float = 0.0, cpus: float = 1.0, **args: Any) -> ServedModelConfig:
    return ServedModelConfig(model="m", gpus_per_replica=gpus, cpus_per_replica=cpus, engine_args=args)


def test_one_worker_takes_what_the_config_says_and_no_placement_group() -> None:
    found = placement(served(gpus=0.5, cpus=2))
    assert (found.cpus, found.gpus, found.options()) == (2, 0.5, {})


def test_the_workers_of_one_node_share_the_replicas_own_gpus() -> None:
    found = placement(served(gpus=4, tensor_parallel_size=2, pipeline_parallel_size=2))
    assert (found.gpus, found.options()) == (4, {})


@pytest.mark.parametrize(("pipeline", "strategy"), [(1, "STRICT_PACK"), (2, "PACK")])
def test_ray_workers_get_a_bundle_each_and_pack_by_pipeline_stage(pipeline: int, strategy: str) -> None:
    found = placement(
        served(
            gpus=2 * pipeline,
            tensor_parallel_size=2,
            pipeline_parallel_size=pipeline,
            distributed_executor_backend="ray",
        )
    )
    assert found.gpus == 0.0
    assert found.options() == {
        "placement_group_bundles": [{"CPU": 1.0}, *({"GPU": 1.0} for _ in range(2 * pipeline))],
        "placement_group_strategy": strategy,
    }


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (served(gpus=1, tensor_parallel_size=4), r"models\[1\].gpus_per_replica is 1; tensor 4 takes 4"),
        (served(gpus=4), r"gpus_per_replica is 4; one worker takes 1"),
        (served(gpus=0.5, tensor_parallel_size=2), r"is 0.5; tensor 2 takes 2"),
        (served(tensor_parallel_size=2), r"models\[1\].cpus_per_replica is 1; tensor 2 is 2 workers"),
        (served(cpus=2, pipeline_parallel_size=2), "Use tensor_parallel_size"),
        (served(cpus=2, tensor_parallel_size=2, distributed_executor_backend="ray"), "for GPUs only"),
        (served(gpus=2, data_parallel_size=2, distributed_executor_backend="ray"), r"Raise models\[1\].replicas"),
        (served(tensor_parallel_size="2"), r"tensor_parallel_size is '2'; it must be a whole number"),
        (served(tensor_parallel_size=0), "is 0; it must be a whole number"),
    ],
)
def test_degrees_that_do_not_fit_are_refused_with_the_numbers(config: ServedModelConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        placement(config, "models[1]")


def test_a_tensor_group_on_two_nodes_is_refused() -> None:
    bundles = [{"CPU": 1.0}, *({"GPU": 1.0} for _ in range(4))]
    check_nodes(bundles, {0: "a", 1: "a", 2: "a", 3: "b", 4: "b"}, {"tensor_parallel_size": 2})
    with pytest.raises(EngineError, match="3 on a, 1 on b"):
        check_nodes(bundles, {0: "a", 1: "a", 2: "a", 3: "a", 4: "b"}, {"tensor_parallel_size": 2})
