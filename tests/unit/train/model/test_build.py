"""Models, adapters and their loss, in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.checkpoint.export import export, export_tensors
from tandem.config import LoraConfig, ModelConfig
from tandem.data.packing import IGNORED, pack
from tandem.data.tokenize import Encoded, TextEncoder
from tandem.errors import ConfigError
from tandem.train.adapters.dora import DoraMagnitude
from tandem.train.adapters.lora import DEFAULT_TARGET_MODULES, add_adapters, find_target_modules
from tandem.train.model.build import build_model, count_parameters, decoder_layers
from tandem.train.objectives.objective import NextToken, count_targets, step_loss

OTHERS: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)


def test_the_same_seed_gives_the_same_weights(encoder: TextEncoder, model: torch.nn.Module):
    again = build_model(SHAPE, None, encoder, seed=0)
    other = build_model(SHAPE, None, encoder, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_new_model_has_the_configured_shape(encoder: TextEncoder, architecture: str):
    config = ModelConfig(
        architecture=architecture, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=48,
        max_length=64, rope_theta=5000.0,
    )  # fmt: skip
    built = build_model(config, None, encoder, seed=0)
    assert len(list(decoder_layers(built))) == 3
    assert built.config.vocab_size == encoder.vocab_size
    assert built.config.rope_parameters["rope_theta"] == 5000.0
    assert built.config.eos_token_id == encoder.token_id("eos_token")
    assert built.get_input_embeddings().weight is built.get_output_embeddings().weight


def test_documents_of_a_row_do_not_attend_to_each_other(model: torch.nn.Module):
    first, second = [5, 6, 7, 8], [9, 10, 11, 12, 13]
    both = torch.from_numpy(pack([Encoded(d, [True] * len(d)) for d in (first, second)], 12, 0, split=False)).long()
    alone = torch.from_numpy(pack([Encoded(second, [True] * 5)], 12, 0, split=False)).long()
    packed = model(input_ids=both[:, 0], position_ids=both[:, 2], use_cache=False).logits[0, 4:9]
    single = model(input_ids=alone[:, 0], position_ids=alone[:, 2], use_cache=False).logits[0, :5]
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)


def test_the_loss_is_the_sum_over_labelled_tokens(model: torch.nn.Module):
    documents = [Encoded([5, 6, 7, 8], [False, False, True, True]), Encoded([9, 10, 11], [True] * 3)]
    rows = torch.from_numpy(pack(documents, 8, 0, split=False)).long()
    assert count_targets(rows[:, 1]) == 4
    logits = model(input_ids=rows[:, 0], position_ids=rows[:, 2], use_cache=False).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows[:, 1, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.testing.assert_close(NextToken().loss(model, rows)[0], expected)


def test_gradients_of_micro_batches_and_ranks_add_up_to_the_mean_over_tokens():
    # Two ranks with two micro-batches each: data parallelism averages over ranks, accumulation adds.
    totals = torch.tensor([[3.0, 1.0], [5.0, 2.0]])
    targets = torch.tensor(7)
    per_rank = torch.stack([sum(step_loss(t, targets, 2) for t in rank) for rank in totals])
    assert float(per_rank.mean()) == pytest.approx(11 / 7)
    assert math.isfinite(float(step_loss(torch.tensor(0.0), torch.tensor(0), 2)))


def test_only_adapters_require_gradients(model: torch.nn.Module):
    total, _ = count_parameters(model)
    adapted = add_adapters(model, LoraConfig(rank=4), base_id="base@1", seed=0)
    with_adapters, trained = count_parameters(adapted)
    assert trained == with_adapters - total > 0
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert adapted.peft_config["default"].base_model_name_or_path == "base@1"
    assert len(list(decoder_layers(adapted))) == 2


def test_an_unknown_target_module_is_refused_with_the_nearest(model: torch.nn.Module):
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        add_adapters(model, LoraConfig(target_modules=("q_projj",)), base_id="b", seed=0)


@pytest.fixture
def mixture(encoder: TextEncoder) -> Any:
    config = ModelConfig(
        architecture="qwen3_moe", hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64, num_experts=4,
        experts_per_token=2, moe_intermediate_size=16,
    )  # fmt: skip
    return build_model(config, None, encoder, seed=0).eval()


def test_a_mixture_is_exported_with_separate_experts(mixture: Any, tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    export(mixture, export_tensors(mixture), tmp_path / "export")
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    # What vLLM's class of that name asks its config.
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 16)
    assert (config.norm_topk_prob, config.mlp_only_layers, config.decoder_sparse_step) == (True, [], 1)
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.experts.3.gate_proj.weight").get_shape() == [16, 32]
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(5, 15)[None]
    assert torch.equal(loaded(input_ids=ids).logits, mixture(input_ids=ids).logits)


def test_adapters_of_a_mixture_are_put_on_its_attention(mixture: Any):
    adapted = add_adapters(mixture, LoraConfig(rank=4), base_id="b", seed=0)
    owners = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert owners == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert set(adapted.peft_config["default"].target_modules) == owners


def test_adapters_for_experts_are_refused(mixture: Any):
    with pytest.raises(
        ConfigError, match="'gate_proj', which the model lacks. Its experts are stacked in one parameter"
    ):
        add_adapters(mixture, LoraConfig(target_modules=("gate_proj",)), base_id="b", seed=0)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_matches_peft(encoder: TextEncoder, dropout: float):
    config = LoraConfig(rank=4, dora=True, dropout=dropout)
    ours: Any = add_adapters(build_model(SHAPE, None, encoder, seed=0), config, base_id="b", seed=0)
    theirs: Any = peft.get_peft_model(
        build_model(SHAPE, None, encoder, seed=0),
        peft.LoraConfig(
            r=4, lora_alpha=32.0, lora_dropout=dropout, target_modules=list(DEFAULT_TARGET_MODULES), use_dora=True
        ),
    )
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.arange(5, 25)[None]
    told = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        logits = model.train()(input_ids=ids).logits
        logits.square().mean().backward()
        told.append([logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    for mine, other in zip(*told, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_dora_of_a_layer_with_a_bias_scales_only_its_weight():
    layer = torch.nn.Linear(6, 5)
    lora_a, lora_b = torch.nn.Linear(6, 2, bias=False), torch.nn.Linear(2, 5, bias=False)
    length = torch.nn.Parameter(torch.rand(5) + 0.5)
    x = torch.randn(3, 6)
    added = DoraMagnitude(length)(x, lora_A=lora_a, lora_B=lora_b, scaling=0.5, base_layer=layer, base_result=layer(x))
    weight = layer.weight + 0.5 * lora_b.weight @ lora_a.weight
    weight = length[:, None] * weight / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x) + added, F.linear(x, weight, layer.bias))


def test_an_unloadable_base_is_refused(encoder: TextEncoder, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_model(ModelConfig(base="x"), tmp_path, encoder, seed=0)


@pytest.mark.parametrize(
    ("family", "adapted"),
    [
        ("gpt_neox", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        ("olmo2", list(DEFAULT_TARGET_MODULES)),
    ],
)
def test_all_linear_layers_are_adapted_if_none_has_a_known_name(family: str, adapted: list[str]):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **OTHERS))
    assert find_target_modules(model, LoraConfig()) == adapted


def test_a_model_without_linear_layers_is_refused_an_adapter():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=90)
    )
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no linear layers"):
        find_target_modules(model, LoraConfig())
