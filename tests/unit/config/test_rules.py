"""What the configs refuse although each value alone could be."""

from __future__ import annotations

import dataclasses

import pytest

from tandem.config import (
    DataConfig,
    DpoConfig,
    EvaluationConfig,
    GatewayConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    ServeConfig,
    ServedModelConfig,
    TrainConfig,
    check,
    from_dict,
)
from tandem.errors import ConfigError, LayoutError


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
        (
            {"architecture": "qwen3_moe", "experts_per_token": 2},
            r"'qwen3_moe', but model\.num_experts is not set\. Set it, such as 8\.",
        ),
        (
            {"architecture": "qwen3_moe", "num_experts": 4, "experts_per_token": 2, "intermediate_size": 400},
            r"model\.moe_intermediate_size is not set\. Set it, such as 100\.",
        ),
        (
            {"architecture": "qwen3_moe", "num_experts": 4, "experts_per_token": 5, "moe_intermediate_size": 8},
            r"experts_per_token \(5\) is more than model\.num_experts \(4\)\. Lower it to 4",
        ),
        (
            {"architecture": "qwen3_moe", "num_experts": 4, "experts_per_token": 0, "moe_intermediate_size": 8},
            "experts_per_token is 0; it must be at least 1",
        ),
        ({"num_experts": 8}, r"num_experts is 8, but model\.architecture is 'llama', which has no experts"),
    ],
)
def test_a_shape_that_no_model_can_have_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize("degree", ["pipeline", "replicate", "context", "expert", "tensor"])
def test_deepspeed_shares_the_data_only(degree):
    with pytest.raises(LayoutError, match=rf"{degree}=2 needs strategy fsdp2; deepspeed shares the data only\. Set"):
        ParallelismConfig(workers=4, strategy="deepspeed", **{degree: 2})
    with pytest.raises(LayoutError, match=r"deepspeed\.offload_parameters say what"):
        ParallelismConfig(workers=4, strategy="deepspeed", offload=True)
    assert ParallelismConfig(workers=4, strategy="deepspeed").shard == 4


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
        (OptimizerConfig, {"betas": (0.9, 1.0)}),
        (OptimizerConfig, {"weight_decay": -0.1}),
        (OptimizerConfig, {"decay_steps": 0, "schedule": "wsd"}),
        (DpoConfig, {"beta": 0.0}),
        (DpoConfig, {"label_smoothing": 0.5}),
        (EvaluationConfig, {"held_out": 0.6}),
        (EvaluationConfig, {"rows": 0}),
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


ZERO = {"parallel": {"strategy": "deepspeed"}}


def train(**values: object) -> TrainConfig:
    return from_dict(TrainConfig, {"name": "n", "data": {"path": "p"}, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"precision": "float8"},
            r"'float8', which only GPUs compute, and parallel\.gpus_per_worker is 0\. Set it to 1",
        ),
        ({"optimizer": {"name": "adamw_8bit"}}, r"'adamw_8bit'.*parallel\.gpus_per_worker is 0\. Set it to 1"),
        (
            {"precision": "float8", "parallel": {"gpus_per_worker": 1}, "lora": {"rank": 8}, "model": {"base": "b"}},
            r"lora is set \(rank 8\)",
        ),
        (
            {"lora": {"quantize": "nf4"}, "model": {"base": "b"}},
            r"lora\.quantize is 'nf4'.*parallel\.gpus_per_worker is 0\. Set it to 1, or unset lora\.quantize",
        ),
        ({"lora": {"quantize": "nf5"}, "model": {"base": "b"}}, "lora.quantize is 'nf5'.*Did you mean 'nf4'"),
        ({"optimizer": {"schedule": "wsd"}}, r"decay_steps is not set\. Set it"),
        ({"optimizer": {"decay_steps": 5}}, r"decay_steps is 5.*schedule is 'cosine'"),
        (
            {"optimizer": {"schedule": "wsd", "decay_steps": 95}, "steps": 100},
            r"\(10 \+ 95 = 105\) is more than steps \(100\)",
        ),
        ({"deepspeed": {"stage": 2}}, r"deepspeed is set, but parallel\.strategy is 'fsdp2'\. Set it to 'deepspeed'"),
        ({**ZERO, "deepspeed": {"stage": 4}}, r"deepspeed\.stage is 4; it must be between 1 and 3"),
        (
            {**ZERO, "deepspeed": {"offload_optimizer": "disk"}},
            r"offload_optimizer is 'disk'; it must be one of none, cpu",
        ),
        (
            {**ZERO, "deepspeed": {"stage": 2, "offload_parameters": "cpu"}},
            r"offload_parameters is 'cpu', which needs stage 3; deepspeed\.stage is 2\. Set it to 3",
        ),
        (
            {**ZERO, "deepspeed": {"stage": 1, "offload_optimizer": "nvme", "nvme_path": "/n"}},
            r"offload_optimizer is 'nvme', which needs stage 3.*or offload_optimizer to cpu",
        ),
        ({**ZERO, "deepspeed": {"offload_parameters": "nvme"}}, r"nvme_path is not set\. Set it to a folder"),
        ({**ZERO, "deepspeed": {"nvme_path": "/n"}}, r"nvme_path is '/n', but nothing is offloaded to it"),
        ({**ZERO, "ema": 0.9}, r"ema is 0\.9, but ZeRO 3 leaves no rank.*deepspeed\.stage to 1 or 2"),
        (
            {"parallel": {"strategy": "deepspeed", "gpus_per_worker": 1}, "precision": "float8"},
            r"precision is 'float8', which does not go with parallel\.strategy 'deepspeed'\. Set it to 'bfloat16'",
        ),
        (
            {"parallel": {"strategy": "deepspeed", "gpus_per_worker": 1}, "optimizer": {"name": "adamw_8bit"}},
            r"optimizer\.name is 'adamw_8bit', which does not go with parallel\.strategy 'deepspeed'",
        ),
        ({**ZERO, "compile": True}, r"compile is True, which does not go with.*Set it to false, or parallel\.strategy"),
        (
            {**ZERO, "lora": {"dora": True}, "model": {"base": "b"}},
            r"lora\.dora is on, which reads weights that ZeRO 3 has let go of.*stage to 1 or 2",
        ),
        ({"ema": 1.0}, r"ema is 1\.0; it must be above 0 and below 1"),
        ({"objective": "dpo"}, r"model\.base is not set"),
        ({"dpo": {"beta": 0.2}}, r"objective is 'next_token'\. Set objective to 'dpo'"),
        (
            {"objective": "dpo", "model": {"base": "b"}, "data": {"path": "p", "loss_on": "all"}},
            "'all', but dpo compares",
        ),
        ({"evaluation": {"data": "p"}}, r"which is trained on \(data\.path\)"),
        ({"evaluation": {"data": "q", "held_out": 0.1}}, r"are both set"),
        ({"evaluation": {"held_out": 0.0}}, "nothing to evaluate on"),
        ({"recompute": "fulll"}, "Did you mean 'full'"),
        (
            {"compile": True, "parallel": {"workers": 2, "pipeline": 2, "schedule": "zero_bubble"}},
            r"'zero_bubble'.*parallel\.schedule to 'interleaved'",
        ),
        ({"attention": "flex", "compile": True}, r"compile is true and parallel\.gpus_per_worker is 0\. Set both"),
        ({"attention": "flex", "parallel": {"gpus_per_worker": 1}}, r"compile is false and parallel"),
        (
            {"attention": "flex", "compile": True, "parallel": {"workers": 2, "context": 2, "gpus_per_worker": 1}},
            r"parallel\.context is 2.*Set attention to 'sdpa'",
        ),
        ({"precision": "float-16"}, "Did you mean 'float16'"),
        ({"checkpoint": {"path": "runs/here"}}, r"'runs/here', which is relative.*s3://bucket/runs"),
        ({"checkpoint": {"best": "evaluation_loss"}}, r"evaluation is not set\. Set evaluation"),
        ({"checkpoint": {"best": "accuracy"}}, r"'accuracy'; it must be 'loss', or what an evaluation measures"),
        (
            {"checkpoint": {"best": "evaluation_loss", "every_steps": 50}, "evaluation": {"every_steps": 20}},
            r"every_steps \(50\) must be a multiple of evaluation\.every_steps \(20\)",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_with_the_next_step(values, message):
    with pytest.raises(ConfigError, match=message):
        train(**values)


@pytest.mark.parametrize("path", ["/runs", "~/runs", "s3://bucket/runs", "file:///runs"])
def test_checkpoints_may_lie_anywhere_that_every_node_finds(path):
    kept = train(
        checkpoint={"path": path, "best": "evaluation_loss", "every_steps": 40}, evaluation={"every_steps": 20}
    )
    assert kept.checkpoint.path == path


def test_what_needs_a_gpu_is_allowed_on_one():
    found = train(precision="float8", optimizer={"name": "adamw_8bit"}, parallel={"gpus_per_worker": 1})
    assert found.precision == "float8"
    assert train(attention="flex", compile=True, parallel={"gpus_per_worker": 1}).attention == "flex"


def test_a_share_is_held_out_unless_other_data_is_named():
    assert EvaluationConfig().share == 0.05
    assert EvaluationConfig(held_out=0.2).share == 0.2
    assert EvaluationConfig(data="q").share == 0


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ({"objective": "dpo", "model": {"base": "b"}}, "pairs", "d holds pairs.*prompt, chosen and rejected"),
        ({}, "preferences", "d holds preferences, which objective 'dpo' learns from"),
        ({"data": {"path": "p", "loss_on": "answers"}}, "text", "plain text without answers"),
    ],
)
def test_data_that_the_objective_cannot_learn_from_is_refused(values, kind, message):
    with pytest.raises(ConfigError, match=message):
        train(**values).check_kind(kind, "d")
