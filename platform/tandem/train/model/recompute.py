"""Activation checkpointing: activations are recomputed in the backward pass, which trades time for memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tandem.errors import ConfigError

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
"""Operations whose results `selective` keeps: matrix products and attention, which take nearly all of a layer's time."""


def recompute_activations(model: nn.Module, mode: str) -> nn.Module:
    """Enable activation checkpointing of the decoder layers: none (keep all), selective (keep products), or full.

    Gradients are unchanged. Call it before the model is split or sharded; returns `model`, changed in place.
    Raises ConfigError if the model's class cannot do it.
    """
    if mode == "none":
        return model
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    enable: Any = model.gradient_checkpointing_enable
    try:
        enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise ConfigError(
            f"recompute is {mode!r}, which the model cannot do: {error} Set recompute to 'none'."
        ) from error
    return model


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
