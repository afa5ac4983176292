"""What the configs refuse although each value alone could be."""

from __future__ import annotations

import dataclasses

import pytest

from tandem.config import (
    DataConfig,
    GatewayConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ServeConfig,
    ServedModelConfig,
    TrainConfig,
    check,
    from_dict,
)
from tandem.errors import ConfigError


@pytest.mark.parametrize(("batch", "nearest"), [(7, 8), (5, 4), (1, 4), (11, 12)])
def test_a_batch_that_the_workers_cannot_share_is_refused_with_the_nearest_that_works(batch, nearest):
    with pytest.raises(ConfigError, match=rf"2 x 2 = 4\)\. The nearest that works is {nearest}\."):
        from_dict(
            TrainConfig,
            {"name": "n", "data": {"path": "p"}, "batch_size": batch, "accumulate": 2, "parallel": {"workers": 2}},
        )


def test_an_adapter_needs_a_base():
    with pytest.raises(ConfigError, match=r"lora is set but model\.base is not"):
        TrainConfig(name="n", data=DataConfig(path="p"), lora=LoraConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hidden_size": 100, "num_heads": 6},
            r"model\.hidden_size \(100\) must be a multiple of model\.num_heads \(6\)",
        ),
        ({"num_heads": 6, "num_kv_heads": 4}, r"num_heads \(6\) must be a multiple of model\.num_kv_heads \(4\)"),
        ({"hidden_size": 18, "num_heads": 6, "num_kv_heads": 1}, "is 3; rotary positions need an even head width"),
        ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
        ({"architecture": "lama"}, "Did you mean 'llama'"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


def test_the_defaults_are_allowed():
    assert ModelConfig().head_dim == 32
    for cls in (LoraConfig, OptimizerConfig, GatewayConfig, ServeConfig):
        cls()


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (LoraConfig, {"rank": 0}),
        (LoraConfig, {"rank": 513}),
        (LoraConfig, {"dropout": 1.0}),
        (LoraConfig, {"target_modules": ()}),
        (OptimizerConfig, {"learning_rate": 0.0}),
        (OptimizerConfig, {"learning_rate": float("nan")}),
        (OptimizerConfig, {"clip_norm": float("nan")}),
        (OptimizerConfig, {"final_fraction": 1.1}),
        (GatewayConfig, {"replicas": 0}),
        (GatewayConfig, {"max_body_bytes": 10}),
    ],
)
def test_a_number_outside_its_range_is_refused(cls, values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        cls(**values)


def test_two_served_models_cannot_share_a_name():
    with pytest.raises(ConfigError, match="'a' is listed 2 times"):
        ServeConfig(models=(ServedModelConfig(model="a"), ServedModelConfig(model="b", name="a")))
    assert len(ServeConfig(models=(ServedModelConfig(model="a"), ServedModelConfig(model="a", name="b"))).models) == 2


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().num_layers = 3  # type: ignore[misc]


def test_not_a_number_is_in_no_range():
    with pytest.raises(ConfigError):
        check.at_least("x", float("nan"), 0)
    with pytest.raises(ConfigError):
        check.between("x", float("nan"), 0, 1)
