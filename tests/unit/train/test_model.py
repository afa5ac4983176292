"""Models, adapters and their loss, in one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tandem.config import LoraConfig, ModelConfig
from tandem.data.packing import IGNORED, pack
from tandem.data.tokenize import Encoded, TextEncoder
from tandem.errors import ConfigError
from tandem.train.lora import add_adapters
from tandem.train.model import build_model, count_parameters, decoder_layers
from tandem.train.objective import NextToken, count_targets, step_loss

SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)


def test_the_same_seed_gives_the_same_weights(encoder: TextEncoder, model: torch.nn.Module):
    again = build_model(SHAPE, None, encoder, seed=0)
    other = build_model(SHAPE, None, encoder, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_new_model_has_the_shape_asked_for(encoder: TextEncoder, architecture: str):
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


def test_a_document_sees_nothing_of_its_neighbours_in_a_row(model: torch.nn.Module):
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


def test_only_adapters_train(model: torch.nn.Module):
    total, _ = count_parameters(model)
    adapted = add_adapters(model, LoraConfig(rank=4), base_id="base@1", seed=0)
    with_adapters, trained = count_parameters(adapted)
    assert trained == with_adapters - total > 0
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert adapted.peft_config["default"].base_model_name_or_path == "base@1"
    assert len(list(decoder_layers(adapted))) == 2


def test_a_target_module_that_is_not_there_is_refused_with_the_nearest(model: torch.nn.Module):
    with pytest.raises(ConfigError, match="Did you mean 'q_proj'"):
        add_adapters(model, LoraConfig(target_modules=("q_projj",)), base_id="b", seed=0)


def test_a_base_that_cannot_be_loaded_is_refused(encoder: TextEncoder, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_model(ModelConfig(base="x"), tmp_path, encoder, seed=0)
