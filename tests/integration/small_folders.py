"""Folders in the form of a model and of a LoRA adapter for it, of a few numbers each, made without torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, HIDDEN = 6, 4
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {f"{Q}.weight": (WIDTH, HIDDEN), f"{V}.weight": (2, HIDDEN), "model.embed_tokens.weight": (8, HIDDEN)}


def small_model(folder: Path, content: str = "weights", config: object = None) -> Path:
    """A model; other `content` gives other numbers, and so another digest."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"max_position_embeddings": 512} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    _save(folder / "model.safetensors", SHAPES, content)
    return folder


def small_adapter(
    folder: Path,
    content: str = "delta",
    *,
    rank: Any = 16,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    dtype: Any = np.float32,
    **config: Any,
) -> Path:
    """An adapter of the model above; `tensors` instead of its own, and keys of adapter_config.json beside the usual ones."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    inner = rank if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0 else 16
    usual = {
        f"base_model.model.{layer}.lora_{kind}.weight": (inner, HIDDEN) if kind == "A" else (out, inner)
        for layer, out in ((Q, WIDTH), (V, 2))
        for kind in "AB"
    }
    _save(folder / "adapter_model.safetensors", usual if tensors is None else tensors, content, dtype)
    return folder


def _save(path: Path, shapes: Mapping[str, tuple[int, ...]], content: str, dtype: Any = np.float32) -> None:
    dice = np.random.default_rng(zlib.crc32(content.encode()))
    save_file({name: dice.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}, path)
