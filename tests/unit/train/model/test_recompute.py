"""Recomputation changes memory, not gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.config import LoraConfig
from tandem.errors import ConfigError
from tandem.train.adapters.lora import add_adapters
from tandem.train.model.recompute import recompute_activations


class Counted(TorchDispatchMode):
    """Counts matrix products and sigmoid-linear units as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.units = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += operation is torch.ops.aten.mm.default
        self.units += operation is torch.ops.aten.silu.default
        return operation(*args, **(kwargs or {}))


def step(model: Any) -> tuple[float, list[torch.Tensor], Counted]:
    """Loss, gradients and what ran, of one forward and backward pass."""
    ids = torch.arange(5, 25)[None]
    with Counted() as counted:
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters() if p.requires_grad], counted


@pytest.mark.parametrize("adapters", [False, True])
def test_recomputation_keeps_gradients_and_computes_more(model: Any, adapters: bool):
    found = {}
    for mode in ("none", "selective", "full"):
        changed = copy.deepcopy(model)
        if adapters:
            changed = add_adapters(changed, LoraConfig(rank=4), base_id="b", seed=0)
            # As transformers does for recomputation: gradients then go down to the embeddings, which costs products too.
            changed.enable_input_require_grads()
        found[mode] = step(recompute_activations(changed, mode))
    for mode in ("selective", "full"):
        assert found[mode][0] == found["none"][0]
        for ours, theirs in zip(found[mode][1], found["none"][1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)
    counted = {mode: result[2] for mode, result in found.items()}
    # 2 layers: each unit runs again in the backward pass, products only if all is forgotten.
    assert counted["none"].units == 2 and counted["selective"].units == counted["full"].units == 4
    assert counted["selective"].products == counted["none"].products < counted["full"].products


def test_a_model_without_support_for_recomputation_is_refused(model: Any):
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="Set recompute to 'none'"):
        recompute_activations(model, "full")
