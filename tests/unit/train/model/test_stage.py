"""The forward pass of a stage equals transformers' for every supported family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.config import ModelConfig
from tandem.config.training.layout import FAMILIES, ModelShape
from tandem.data.tokenize import TextEncoder
from tandem.errors import LayoutError
from tandem.train.model.build import build_model
from tandem.train.model.stage import Stage, TransformersForward

SMALL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_of_all_layers_matches_transformers(family: str):
    torch.manual_seed(0)
    values = SMALL | (MIXTURE if family in ("mixtral", "qwen3_moe") else {})
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values)).eval()
    ids = torch.randint(1, 90, (2, 12))
    positions = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    stage = Stage(model, range(2), first=True, last=True)
    torch.testing.assert_close(stage(ids, positions), expected)


def test_a_model_has_the_same_shape_by_its_config_and_by_its_files(encoder: TextEncoder):
    for config in (
        ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64),
        ModelConfig(
            architecture="qwen3_moe", hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
            num_experts=4, experts_per_token=2, moe_intermediate_size=16,
        ),
    ):  # fmt: skip
        built: Any = build_model(config, None, encoder, seed=0)
        assert ModelShape.read(built.config.to_dict()) == ModelShape.of(config)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "phi3", "olmo2", "gpt_neox"])
def test_other_families_separate_documents_by_position(family: str):
    torch.manual_seed(0)
    small = {**SMALL, "head_dim": 8, "sliding_window": 8, "n_head": 4, "n_embd": 32, "n_layer": 2, "n_positions": 64}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
    TransformersForward(model, []).check_documents(torch.device("cpu"))


def test_a_model_that_mixes_documents_is_refused():
    class Mixing(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 8).float().cumsum(1))

    with pytest.raises(LayoutError, match="Mixing does not keep the documents of a packed row apart"):
        TransformersForward(Mixing(), []).check_documents(torch.device("cpu"))
