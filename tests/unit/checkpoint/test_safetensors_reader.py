"""Any slice of a model's tensors is read from the files that transformers writes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.checkpoint.safetensors_reader import SafetensorsReader
from tandem.config.training.layout import FAMILIES

SMALL = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "head_dim": 8,
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


def written(family: str, folder: Path, size: str = "20KB") -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))
    model.save_pretrained(folder, max_shard_size=size)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "olmo2", "phi3"])
def test_every_slice_equals_the_models_tensor(family: str, tmp_path: Path):
    model, chance = written(family, tmp_path), random.Random(0)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = SafetensorsReader(tmp_path)
    parameters = dict(model.named_parameters())
    assert source.missing({name: p.shape for name, p in parameters.items()}) == []
    for name, parameter in parameters.items():
        for _ in range(5):
            offsets = [chance.randrange(size) for size in parameter.shape]
            sizes = [chance.randint(1, size - at) for at, size in zip(offsets, parameter.shape, strict=True)]
            where = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
            assert torch.equal(source.read(name, offsets, sizes), parameter[where]), name


def test_missing_tensors_and_other_shapes_are_listed(tmp_path: Path):
    written("qwen3_moe", tmp_path, "1GB")
    experts, norm = "model.layers.0.mlp.experts.down_proj", "model.norm.weight"
    source = SafetensorsReader(tmp_path)
    assert source.missing({norm: (32,), experts: (4, 32, 16)}) == []
    others = {"model.other.weight": (32,), norm: (33,), "model.layers.7.mlp.experts.down_proj": (4, 32, 16)}
    assert source.missing(others) == list(others)
    assert SafetensorsReader(tmp_path / "nothing").missing({norm: (32,)}) == [norm]
