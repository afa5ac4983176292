"""A merged model equals its base with the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tandem.checkpoint.export import export, export_tensors
from tandem.cli.models import models_app
from tandem.config import LoraConfig
from tandem.data.build import tokenizer_files
from tandem.data.tokenize import TextEncoder
from tandem.registry import Registry
from tandem.train.adapters.lora import add_adapters

IDS = torch.arange(5, 25)[None]


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_model_gives_the_logits_of_base_and_adapter(
    model: Any, encoder: TextEncoder, tandem_home: Path, tmp_path: Path, dora: bool
):
    export(model, export_tensors(model), tmp_path / "base", extra_files=tokenizer_files(Path(encoder.folder)))
    registry = Registry.open()
    registry.register_model("base", tmp_path / "base")
    adapted: Any = add_adapters(model, LoraConfig(rank=4, dora=dora), base_id="base@1", seed=0).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.1)
    export(adapted, export_tensors(adapted), tmp_path / "adapter")
    assert registry.register_adapter("helper", tmp_path / "adapter", base="base").dora is dora
    result = CliRunner().invoke(models_app, ["merge", "helper", "whole"])
    assert result.exit_code == 0, result.output
    record = registry.resolve("whole")
    assert (record.id, record.lineage) == ("whole@1", {"merged": "helper@1", "base": "base@1"})
    merged = AutoModelForCausalLM.from_pretrained(record.path)
    torch.testing.assert_close(merged(input_ids=IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    assert TextEncoder(str(record.path)).vocab_size == encoder.vocab_size


def test_merging_a_model_into_a_model_is_refused(model: Any, tandem_home: Path, tmp_path: Path):
    export(model, export_tensors(model), tmp_path / "base")
    Registry.open().register_model("base", tmp_path / "base")
    result = CliRunner().invoke(models_app, ["merge", "base", "whole"])
    assert result.exit_code == 1 and "base@1 is a model, not an adapter" in result.output
