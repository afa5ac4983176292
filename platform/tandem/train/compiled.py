"""Decoder layers compiled by torch.compile: fewer, larger kernels for what is between the matrix products.

Layer by layer, because all layers are alike and so share one compilation, and because a layer is what FSDP2 shards: its hooks
stay outside. Recomputation goes inside: the compiler then decides what to keep, and sees the second pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward and backward, in place; parameters keep their names.

    To be called after `recompute_activations` and after layers are cut, and before they are sharded. The first step of each
    shape of batch takes longer: it compiles.
    """
    for layer in layers:
        # Each shape is compiled for itself: training has one, and a kernel for any shape is slower.
        layer.forward = torch.compile(_recomputing(layer), dynamic=False)


def _recomputing(layer: Any) -> Callable[..., Any]:
    """A layer's forward, with the recomputation that transformers would have put around the whole layer."""
    forward: Callable[..., Any] = layer.forward
    if not getattr(layer, "gradient_checkpointing", False):
        return forward
    checkpoint = layer._gradient_checkpointing_func
    layer.gradient_checkpointing = False

    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **kwargs) if layer.training else forward(*args, **kwargs)

    return again
