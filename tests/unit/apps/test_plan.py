"""Plan of an app: deployments, engine specs and resources, without Ray or files."""

from __future__ import annotations

import pytest

from tandem.apps.plan import plan
from tandem.apps.resolve import ResolvedApp
from tandem.config import AutoscalingConfig, PrefillConfig, ServeConfig, ServedModelConfig
from tandem.errors import ConfigError
from tandem.registry import RegistryAddress
from tandem.routing.records import ServedModel

ADDRESS = RegistryAddress(url="sqlite:////nowhere", identity="0" * 32)


def app(*configs: ServedModelConfig) -> ResolvedApp:
    models = tuple(
        ServedModel(id=f"{each.model}@1", name=each.model, path=f"/models/{each.model}", config=each)
        for each in configs
    )
    return ResolvedApp(config=ServeConfig(models=configs), models=models, registry=ADDRESS)


def test_each_model_is_one_deployment_with_its_spec_and_resources() -> None:
    one = ServedModelConfig(model="one", engine="vllm", cpus_per_replica=2.0, engine_args={"max_num_seqs": 4})
    two = ServedModelConfig(model="two", engine="echo", gpus_per_replica=1.0)
    first, second = plan(app(one, two)).engines
    assert (first.spec.kind, first.spec.id, first.spec.threads) == ("vllm", "one@1", 2)
    assert (first.spec.where, first.placement.cpus) == ("models[0].engine_args", 2.0)
    assert (second.spec.kind, second.key, second.placement.gpus) == ("echo", "models[1]", 1.0)


def test_prefill_makes_a_second_deployment_with_its_own_resources() -> None:
    prefill = PrefillConfig(replicas=3, cpus_per_replica=4.0, engine_args={"max_num_seqs": 2})
    model = ServedModelConfig(
        model="one", engine="vllm", prefill=prefill, autoscaling=AutoscalingConfig(max_replicas=4)
    )
    generating, prefilling = plan(app(model)).engines
    assert (generating.model.pool, prefilling.model.pool) == ("one@1", "one@1#prefill")
    assert generating.model.config.autoscaling and not prefilling.model.config.autoscaling
    assert (prefilling.model.config.replicas, prefilling.placement.cpus) == (3, 4.0)
    assert prefilling.spec.args["max_num_seqs"] == 2 and "max_num_seqs" not in generating.spec.args
    # The connector that moves the KV cache is the engine's to choose.
    assert "kv_transfer_config" in generating.spec.args and "kv_transfer_config" in prefilling.spec.args
    echo = ServedModelConfig(model="one", engine="echo", prefill=prefill)
    assert all("kv_transfer_config" not in each.spec.args for each in plan(app(echo)).engines)


def test_resources_that_do_not_fit_are_refused_with_the_models_place_in_the_config() -> None:
    wrong = ServedModelConfig(model="two", engine="vllm", gpus_per_replica=1.0, engine_args={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"models\[1\]\.gpus_per_replica is 1; tensor 2 takes 2"):
        plan(app(ServedModelConfig(model="one", engine="vllm"), wrong))
