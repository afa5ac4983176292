"""DoRA (Liu et al. 2024): each row of an adapted weight is a trained magnitude times the row's direction.

    W' = m (W + s B A) / ||W + s B A||        row by row; the norm is a constant in backward (section 4.3 of the paper)

peft creates and initializes the magnitudes, but its forward multiplies by an identity matrix that is no DTensor, and so fails
under tensor parallelism. This forward computes the same on plain weights and on DTensors, which reduce the norms of split rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoraMagnitude(nn.Module):
    """The magnitudes (out) of a weight (out, in). peft's linear layer calls it as peft's own module."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """The term to add to the base layer's output (..., out) for inputs `x` (..., in).

        `base_result`: that output; None if dropout has changed `x` since.
        """
        weight = _dequantized_weight(base_layer)
        with torch.no_grad():
            adapted_weight = weight.to(lora_A.weight.dtype) + scaling * (lora_B.weight @ lora_A.weight)
            row_norms = torch.linalg.vector_norm(adapted_weight.float(), dim=1)
        scale = self.weight / row_norms.to(self.weight.dtype)
        if base_result is None:  # dropout: the base layer had another input
            base_result = F.linear(x, weight.to(x.dtype))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        output_delta: Tensor = (scale - 1) * base_result + scale * (lora_B(lora_A(x)) * scaling)
        return output_delta


def replace_magnitudes(adapted: nn.Module) -> None:
    """Replace each magnitude module of peft's by a `DoraMagnitude`."""
    for module in adapted.modules():
        vectors: Any = getattr(module, "lora_magnitude_vector", None)
        if isinstance(vectors, nn.ModuleDict):
            magnitude: Any
            for name, magnitude in list(vectors.items()):
                vectors[name] = DoraMagnitude(magnitude.weight)


def _dequantized_weight(base_layer: Any) -> Tensor:
    """A layer's weight, dequantized if it is held in 4 bits."""
    if getattr(base_layer.weight, "quant_state", None) is None:
        weight: Tensor = base_layer.weight
        return weight
    from peft.utils.integrations import dequantize_module_weight

    unpacked: Tensor = dequantize_module_weight(base_layer)
    return unpacked
