"""Mixed precision: compute types, float8 layers and loss scaling. Weights, gradients and optimizer state stay float32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from tandem.errors import ConfigError, EnvironmentProblem

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}
"""Compute type by precision; with float8, operations other than matrix products compute in bfloat16."""


def mixed_precision_policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's policy: parameters are gathered in the compute type, gradients are reduced in float32."""
    return MixedPrecisionPolicy(param_dtype=COMPUTE_DTYPES.get(precision), reduce_dtype=torch.float32)


def autocast_context(model: nn.Module, precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The context for a forward pass of `model`: autocast, unless FSDP2 casts the parameters already."""
    if precision not in COMPUTE_DTYPES or getattr(model, "sharded", False):
        return contextlib.nullcontext()
    return torch.autocast(device.type, COMPUTE_DTYPES[precision])


def use_float8(model: nn.Module) -> nn.Module:
    """`model` with its linear layers multiplying in float8, each tensor scaled by its largest value (by torchao).

    The output layer is not converted. Call it before the model is sharded. Raises EnvironmentProblem if torchao is not
    installed, ConfigError if no layer has dimensions that are multiples of 16, which float8 kernels need.
    """
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise EnvironmentProblem(
            "precision 'float8' needs torchao, which is not installed here. `pip install 'tandem[gpu]'` brings it."
        ) from error
    causal_lm: Any = model
    output = causal_lm.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    convertible_ids = {id(m) for m in layers if m.in_features % 16 == 0 and m.out_features % 16 == 0}
    if not convertible_ids:
        raise ConfigError(
            f"precision is 'float8', but none of the model's {len(layers)} linear layers has both dimensions in multiples of "
            "16. Set precision to 'bfloat16', or train a model with another hidden_size and intermediate_size."
        )
    converted: nn.Module = convert_to_float8_training(
        model, module_filter_fn=lambda module, name: id(module) in convertible_ids
    )
    return converted


class LossScaler:
    """Dynamic loss scaling for float16 (Micikevicius et al. 2018): scales the loss up, and gradients down again.

    A step with non-finite gradients is skipped and halves the scale; 2,000 taken steps in a row double it. Every rank has the
    same scale, because it depends on the gradient norm over the whole mesh.
    """

    GROWTH_STEPS = 2000

    def __init__(self, scale: float = 2.0**16) -> None:
        self.scale = scale
        self._good_steps = 0

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        # The scale is a power of two: this is exact.
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        if local:
            torch._foreach_mul_(local, 1 / self.scale)

    def accept(self, norm: float) -> bool:
        """Whether the step may be taken, by the global norm of its gradients; sets the scale of the next."""
        if norm - norm != 0:  # infinite, or not a number
            self.scale = max(1.0, self.scale / 2)
            self._good_steps = 0
            return False
        self._good_steps += 1
        if self._good_steps == self.GROWTH_STEPS:
            self.scale *= 2
            self._good_steps = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"scale": self.scale, "good": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.scale, self._good_steps = float(state["scale"]), int(state["good"])
