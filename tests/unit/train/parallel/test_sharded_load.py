"""Empty models for sharded loading, and the conditions for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.config import DataConfig, LoraConfig, ModelConfig, ParallelismConfig, TrainConfig
from tandem.errors import ConfigError
from tandem.train.parallel.sharded_load import build_empty_model, to_meta

SMALL = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small llama's folder."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    model.save_pretrained(tmp_path)
    return tmp_path


def config(base: Path, workers: int = 2, strategy: str = "fsdp2", **values: Any) -> TrainConfig:
    return TrainConfig(
        name="sliced",
        model=ModelConfig(base=str(base)),
        data=DataConfig(path="x", sequence_length=32),
        parallel=ParallelismConfig(workers=workers, strategy=strategy),
        batch_size=4,
        **values,
    )


def test_an_empty_model_has_names_shapes_and_buffers_and_no_weights(base: Path):
    empty: Any = build_empty_model(config(base), base)
    adapters = to_meta(empty)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    assert not adapters and all(p.is_meta for p in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(empty.named_buffers())[name], buffer)


@pytest.mark.parametrize(
    "change",
    [
        {"workers": 1, "strategy": "ddp"},
        {"strategy": "ddp"},
        {"lora": LoraConfig(dora=True)},
    ],
    ids=["one worker", "replicas", "dora"],
)
def test_no_empty_model_is_built_if_each_rank_needs_all_weights(base: Path, change: dict[str, Any]):
    assert build_empty_model(config(base), base) is not None
    assert build_empty_model(config(base, **change), base) is None


@pytest.mark.parametrize(
    "change",
    [{"quantization_config": {"quant_method": "fp8"}}, {"vocab_size": 91}, {"num_hidden_layers": 3}],
    ids=["quantized files", "another vocabulary", "a layer that no file has"],
)
def test_files_with_other_tensor_names_are_loaded_by_transformers(base: Path, change: dict[str, Any]):
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert build_empty_model(config(base), base) is None


def test_a_base_without_a_config_is_refused_with_its_folder(base: Path):
    (base / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.base .* cannot be loaded"):
        build_empty_model(config(base), base)
