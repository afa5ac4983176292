"""An impossible layout is refused, and the suggested one works."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.config import ModelConfig, ParallelismConfig, TrainConfig, apply_overrides, from_dict, to_dict
from tandem.config.training.layout import (
    ModelShape,
    check_layout,
    length_unit,
    micro_batches_fit,
    nearest_layout,
)
from tandem.errors import LayoutError

DENSE = ModelShape(family="llama", layers=4, heads=8, kv_heads=2, width=96, max_length=512)
MIXTURE = ModelShape(family="qwen3_moe", layers=4, heads=8, kv_heads=4, experts=6, expert_width=20, max_length=512)


def config(**values: Any) -> TrainConfig:
    return from_dict(
        TrainConfig, {"name": "n", "batch_size": 8, **values, "data": {"path": "p", **values.get("data", {})}}
    )


def changed(before: TrainConfig, changes: dict[str, int]) -> TrainConfig:
    return from_dict(
        TrainConfig, apply_overrides(to_dict(before), [f"{key}={value}" for key, value in changes.items()])
    )


@pytest.mark.parametrize(
    ("shape", "values", "message"),
    [
        (
            DENSE,
            {"parallel": {"workers": 4, "tensor": 4}},
            r"tensor \(4\) must divide the model's 2 key/value heads\. The nearest that works: parallel\.tensor=2\.",
        ),
        (
            ModelShape(layers=2, heads=6, kv_heads=6, width=50),
            {"parallel": {"workers": 3, "tensor": 3}, "batch_size": 3, "data": {"sequence_length": 255}},
            r"tensor \(3\) must divide the model's 50 columns of an MLP",
        ),
        (
            MIXTURE,
            {"parallel": {"workers": 8, "tensor": 8}},
            r"tensor \(8\) must divide the model's 4 key/value heads\. The nearest that works: parallel\.tensor=4\.",
        ),
        (
            ModelShape(layers=2, heads=8, kv_heads=8, experts=4, expert_width=20),
            {"parallel": {"workers": 8, "tensor": 8}},
            r"tensor \(8\) must divide the model's 20 columns of an expert",
        ),
        (
            DENSE,
            {"parallel": {"workers": 3, "pipeline": 3}, "accumulate": 4},
            r"4 layers do not divide into the stages of parallel\.pipeline=3\. The nearest that works: parallel\.pipeline=",
        ),
        (
            DENSE,
            {"parallel": {"workers": 4, "pipeline": 4, "schedule": "interleaved"}, "accumulate": 4},
            r"4 layers .* parallel\.pipeline=4 x 2 parts a rank \(interleaved\)\. .* parallel\.pipeline=2",
        ),
        (
            DENSE,
            {"parallel": {"workers": 2, "pipeline": 2}},
            r"'1f1b' needs at least as many micro-batches as stages \(2\), and accumulate is 1\. .*: accumulate=2\.",
        ),
        (
            DENSE,
            {"parallel": {"workers": 2, "pipeline": 2, "schedule": "interleaved"}, "accumulate": 5, "batch_size": 10},
            r"'interleaved' needs micro-batches in whole rounds of 2, and accumulate is 5\. .*: accumulate=",
        ),
        (
            DENSE,
            {"parallel": {"workers": 2, "expert": 2}},
            r"expert is 2, but the model is dense: it has no experts to share\. .*: parallel\.expert=1\.",
        ),
        (
            MIXTURE,
            {"parallel": {"workers": 4, "expert": 4}},
            r"expert \(4\) must divide the model's 6 experts\. .*: parallel\.expert=2\.",
        ),
        (
            DENSE,
            {"parallel": {"workers": 2, "context": 2}, "data": {"sequence_length": 250}},
            r"sequence_length \(250\) must be a multiple of 4, for 2 x parallel\.context\. .*: data\.sequence_length=2(48|52)\.",
        ),
        (
            DENSE,
            {"parallel": {"workers": 2, "tensor": 2}, "data": {"sequence_length": 255}},
            r"sequence_length \(255\) must be a multiple of 2, for parallel\.tensor\.",
        ),
        (
            ModelShape(family="mistral", window=128),
            {"parallel": {"workers": 2, "tensor": 2}, "data": {"sequence_length": 256}},
            r"parallel\.tensor is 2, .* looks back 128 tokens, less than data\.sequence_length \(256\).*: parallel\.tensor=1\.",
        ),
        (
            DENSE,
            {"objective": "dpo", "model": {"base": "b"}, "parallel": {"workers": 2, "pipeline": 2}, "accumulate": 2},
            r"'dpo' does not work across pipeline stages, and parallel\.pipeline is 2\. .*: parallel\.pipeline=1\.",
        ),
        (
            DENSE,
            {"objective": "dpo", "model": {"base": "b"}, "parallel": {"workers": 2, "context": 2}},
            r"'dpo' does not work on shared sequences, and parallel\.context is 2\. .*: parallel\.context=1\.",
        ),
        (
            DENSE,
            {
                "lora": {"quantize": "nf4"}, "model": {"base": "b"},
                "parallel": {"workers": 2, "tensor": 2, "gpus_per_worker": 1},
            },
            r"tensor \(2\) must be 1 with lora\.quantize 'nf4': packed weights cannot be cut",
        ),
        (
            DENSE,
            {
                "lora": {"quantize": "nf4"}, "model": {"base": "b"}, "accumulate": 2,
                "parallel": {"workers": 2, "pipeline": 2, "gpus_per_worker": 1},
            },
            r"quantize does not work across pipeline stages, and parallel\.pipeline is 2\. .*: parallel\.pipeline=1\.",
        ),
    ],
)  # fmt: skip
def test_an_impossible_layout_is_refused_with_the_nearest_that_works(shape, values, message):
    with pytest.raises(LayoutError, match=message):
        check_layout(shape, config(**values))


def test_the_suggested_batch_size_fits_the_suggested_degrees():
    refused = config(parallel={"workers": 4, "tensor": 4}, batch_size=1)
    assert nearest_layout(DENSE, refused) == {"parallel.tensor": 2, "batch_size": 2}


def test_an_unknown_family_is_not_split():
    gemma = ModelShape(family="gemma2", layers=4, heads=4, kv_heads=4)
    check_layout(gemma, config(parallel={"workers": 4, "replicate": 2}))
    with pytest.raises(LayoutError, match="pipeline is 2, .* llama, mistral.* is a 'gemma2'.*: parallel.pipeline=1"):
        check_layout(gemma, config(parallel={"workers": 2, "pipeline": 2}))


@pytest.mark.parametrize(
    "parallel",
    [
        {"workers": 8, "pipeline": 2, "tensor": 2, "context": 2},
        {"workers": 8, "pipeline": 2, "schedule": "interleaved"},
        {"workers": 4, "pipeline": 2, "schedule": "zero_bubble"},
        {"workers": 3, "strategy": "ddp"},
    ],
)
def test_a_layout_that_works_is_not_refused(parallel):
    check_layout(DENSE, config(parallel=parallel, accumulate=2, batch_size=48))


def test_expert_and_tensor_parallelism_combine():
    check_layout(MIXTURE, config(parallel={"workers": 8, "expert": 2, "tensor": 4}))


def test_unknown_shapes_are_not_refused():
    check_layout(
        ModelShape(),
        config(parallel={"workers": 6, "tensor": 3, "pipeline": 2}, accumulate=2, data={"sequence_length": 255}),
    )


def test_a_new_model_has_the_shape_of_its_config():
    moe = ModelConfig(architecture="qwen3_moe", num_experts=8, experts_per_token=2, moe_intermediate_size=64)
    assert ModelShape.of(moe).experts == 8 and ModelShape.of(moe).width is None
    assert ModelShape.of(ModelConfig()) == ModelShape(
        family="llama", layers=4, heads=6, kv_heads=2, width=512, max_length=512
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, ModelShape()),
        (
            {"model_type": "llama", "num_attention_heads": 8, "intermediate_size": 96, "num_hidden_layers": 4},
            ModelShape(family="llama", layers=4, heads=8, kv_heads=8, width=96),
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 96, "sliding_window": None},
            ModelShape(family="mixtral", experts=4, expert_width=96),
        ),
        ({"model_type": "mistral", "sliding_window": 4096}, ModelShape(family="mistral", window=4096)),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, ModelShape(family="qwen2")),
        (
            {
                "model_type": "qwen3_moe",
                "num_experts": 4,
                "moe_intermediate_size": 8,
                "intermediate_size": 96,
                "mlp_only_layers": [0],
            },
            ModelShape(family="qwen3_moe", experts=4, expert_width=8, width=96),
        ),
    ],
)
def test_a_shape_is_read_from_a_models_files(values, expected):
    assert ModelShape.read(values) == expected


@st.composite
def shapes(draw: Any) -> ModelShape:
    layers, kv, groups = draw(st.integers(1, 48)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    experts = draw(st.sampled_from([0, 0, 4, 6, 60]))
    return ModelShape(
        family="qwen3_moe" if experts else "llama",
        layers=layers,
        heads=kv * groups,
        kv_heads=kv,
        width=None if experts else draw(st.sampled_from([96, 100, 512])),
        experts=experts,
        expert_width=draw(st.sampled_from([20, 64, 768])) if experts else None,
        max_length=4096,
    )


@st.composite
def configs(draw: Any) -> TrainConfig:
    pipeline, context, tensor, replicate, expert, outer = (draw(st.integers(1, most)) for most in (6, 3, 8, 2, 4, 2))
    accumulate = draw(st.integers(1, 9))
    workers = pipeline * context * tensor * replicate * expert * outer
    data = replicate * expert * outer
    return config(
        parallel={
            "workers": workers, "pipeline": pipeline, "context": context, "tensor": tensor, "replicate": replicate,
            "expert": expert, "schedule": draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble"])),
            "sequence_parallel": draw(st.booleans()),
        },
        accumulate=accumulate,
        batch_size=data * accumulate * draw(st.integers(1, 3)),
        data={"sequence_length": draw(st.integers(8, 600))},
        **draw(st.sampled_from([{}, {"objective": "dpo", "model": {"base": "b"}}])),
    )  # fmt: skip


@settings(max_examples=150)
@given(shapes(), configs())
def test_every_suggested_layout_is_accepted(shape, asked):
    try:
        check_layout(shape, asked)
    except LayoutError as refused:
        found = dict(re.findall(r"([a-z_.]+)=(\d+)", str(refused).partition("The nearest that works: ")[2]))
        assert found, str(refused)
        check_layout(shape, changed(asked, {key: int(value) for key, value in found.items()}))


def test_schedule_rules_agree_with_torch():
    # Torch's own constructors are asked in tests/unit/train/parallel/test_pipeline.py.
    assert [n for n in range(1, 10) if micro_batches_fit("interleaved", 2, n)] == [1, 2, 3, 4, 6, 8]
    assert [n for n in range(1, 5) if micro_batches_fit("1f1b", 3, n)] == [3, 4]
    assert all(micro_batches_fit(name, 4, 1) for name in ("gpipe", "zero_bubble"))


def test_the_sequence_length_divides_for_context_and_tensor_ranks():
    assert length_unit(config()) == 1
    assert length_unit(config(parallel={"workers": 6, "context": 2, "tensor": 3})) == 12
    assert length_unit(config(parallel={"workers": 6, "context": 2, "tensor": 3, "sequence_parallel": False})) == 4


@given(
    st.integers(1, 64), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(1, 4),
    st.sampled_from(["fsdp2", "ddp"]),
)  # fmt: skip
def test_degrees_that_do_not_multiply_are_refused_step_by_step_to_ones_that_do(
    workers, pipeline, context, expert, tensor, replicate, strategy
):
    values: dict[str, Any] = {
        "workers": workers, "pipeline": pipeline, "context": context, "expert": expert, "tensor": tensor,
        "replicate": replicate, "strategy": strategy,
    }  # fmt: skip
    for _ in range(6):
        try:
            from_dict(ParallelismConfig, values)
            return
        except LayoutError as refused:
            found = re.search(r"(\w+)=(\d+)\.$", str(refused))
            if found:
                values[found[1]] = int(found[2])
            elif "Leave it out" in str(refused):
                values["replicate"] = 1
            else:
                assert "needs strategy fsdp2" in str(refused)
                values["strategy"] = "fsdp2"
    raise AssertionError(values)
