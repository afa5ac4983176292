"""Check of a model's shape against the attention kernels of vLLM's CPU backend, before an engine starts."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import RegistryError
from tandem.registry.folders import model_config

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's CPU backend has kernels for (0.29, `v1/attention/backends/cpu_attn.py`)."""


def unsupported_shape(folder: Path, gpus: float) -> str | None:
    """The reason why vLLM cannot serve the model in a folder on these GPUs; None: no reason is known."""
    if gpus:
        return None
    try:
        config = model_config(folder)
    except RegistryError:
        return None
    # Multimodal configs keep the language model's numbers one level down.
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    width, heads = text.get("hidden_size"), text.get("num_attention_heads")
    size = text.get("head_dim") or (
        width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    )
    # Latent attention has heads of other widths.
    if not isinstance(size, int) or "kv_lora_rank" in text or size in CPU_HEAD_SIZES:
        return None
    return (
        f"Its attention heads have {size} dimensions (head_dim), and vLLM's CPU backend has kernels for "
        f"{', '.join(map(str, CPU_HEAD_SIZES))} only. Train a model with another model.hidden_size / model.num_heads, or serve "
        "it on a GPU."
    )
