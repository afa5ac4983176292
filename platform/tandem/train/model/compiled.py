"""Compilation of decoder layers by torch.compile: fewer, larger kernels between the matrix products.

Layers are compiled one by one: equal layers share one compilation, and FSDP2 shards layers, so its hooks stay outside.
Recomputation goes inside: the compiler then chooses the activations to keep, and compiles the second pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward and backward, in place; parameters keep their names.

    Call it after `recompute_activations` and after layers are split, and before they are sharded. The first step with each batch
    shape takes longer: it compiles.
    """
    for layer in layers:
        # One kernel for each shape: training has one shape, and a kernel for any shape is slower.
        layer.forward = torch.compile(_recomputing(layer), dynamic=False)


def _recomputing(layer: Any) -> Callable[..., Any]:
    """The forward of a layer, with the activation checkpointing that transformers would put around the layer."""
    forward: Callable[..., Any] = layer.forward
    if not getattr(layer, "gradient_checkpointing", False):
        return forward
    checkpoint = layer._gradient_checkpointing_func
    layer.gradient_checkpointing = False

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, **kwargs) if layer.training else forward(*args, **kwargs)

    return recomputing_forward
