"""Trained weights as others load them: a Hugging Face folder, or a peft adapter; both safetensors, published whole."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tandem.storage import publish_folder


def export(model: nn.Module, weights: Mapping[str, torch.Tensor], target: Path, *, beside: Iterable[Path] = ()) -> None:
    """Write `weights`, whole, of a transformers or peft `model` to `target`, replacing what is there; only rank 0 writes.

    A peft model becomes an adapter folder, any other a folder that AutoModelForCausalLM and vLLM load, with copies of the
    files `beside` it: its tokenizer's. The model itself may hold a part, or shards.
    """
    adapter = getattr(model, "peft_config", None) is not None
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    with publish_folder(target, replace=True) as staging:
        (_export_adapter if adapter else _export_model)(model, dict(weights), staging)
        if not adapter:
            for file in beside:
                shutil.copyfile(file, staging / file.name)


def is_whole(target: Path) -> bool:
    """Whether `target` holds an exported model or adapter."""
    adapter = (target / "adapter_config.json").exists() and (target / "adapter_model.safetensors").exists()
    return adapter or ((target / "config.json").exists() and any(target.glob("*.safetensors")))


def _export_model(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    # The trained model may be cut and sharded, and save_pretrained would ask it for its weights: an empty one of its class
    # takes them.
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        shell = type(model)(config)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    shell.load_state_dict(weights, assign=True, strict=False)
    shell.tie_weights()
    if model.generation_config is not None:
        shell.generation_config = model.generation_config
    shell.save_pretrained(folder, state_dict=weights)


def _export_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in adapter.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    config = model.peft_config["default"]
    was, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = was
    # Written by peft from sets, in any order: sorted, so that equal adapters are equal files.
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(_sorted(json.loads(path.read_text())), indent=2, sort_keys=True))


def _sorted(values: dict[str, Any]) -> dict[str, Any]:
    found = values.get("target_modules")
    return {**values, "target_modules": sorted(found)} if isinstance(found, list) else values
