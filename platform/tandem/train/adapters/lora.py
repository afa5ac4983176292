"""LoRA and DoRA adapters, added with peft before the model is sharded."""

from __future__ import annotations

import difflib
from typing import Any, cast

from torch import nn

from tandem.config import LoraConfig
from tandem.errors import ConfigError
from tandem.train.adapters.dora import replace_magnitudes

DEFAULT_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers that get an adapter by default; in a model without these, all linear layers but the head. Experts get none: they
are stacked parameters."""


def add_adapters(model: nn.Module, config: LoraConfig, *, base_id: str, seed: int) -> Any:
    """A peft model around `model` with trained adapters and a frozen base; the same random weights on every rank.

    `base_id` goes into the adapter's config. Raises ConfigError if `target_modules` names no layer of the model.
    """
    import peft
    import torch

    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=find_target_modules(model, config),
            use_dora=config.dora,
            task_type="CAUSAL_LM",
        ),
    )
    if config.dora:
        replace_magnitudes(adapted)
    for peft_config in adapted.peft_config.values():
        peft_config.base_model_name_or_path = base_id
    return adapted


def find_target_modules(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter; ConfigError for one that the model lacks, with the nearest."""
    layer_names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    if config.target_modules is None:
        head = cast(Any, model).get_output_embeddings()
        head_names = {name.rpartition(".")[2] for name, m in model.named_modules() if m is head}
        default_targets = [name for name in DEFAULT_TARGET_MODULES if name in layer_names] or [
            name for name in layer_names if name not in head_names
        ]
        if not default_targets:
            raise ConfigError(
                f"lora is set, but {type(model).__name__} has no linear layers that adapters could be put on. Unset lora to "
                "train all of it."
            )
        return default_targets
    for target in config.target_modules:
        if target not in layer_names:
            close_matches = difflib.get_close_matches(target, layer_names, n=1)
            hint = f" Did you mean {close_matches[0]!r}?" if close_matches else ""
            if any(hasattr(m, "experts") for m in model.modules()):
                hint = " Its experts are stacked in one parameter, which adapters do not reach."
            raise ConfigError(
                f"lora.target_modules names {target!r}, which the model lacks.{hint} Its linear layers: {', '.join(layer_names)}."
            )
    return list(config.target_modules)
