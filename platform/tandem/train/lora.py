"""LoRA by peft: adapters into a model, before it is sharded."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from tandem.config import LoraConfig
from tandem.errors import ConfigError


def add_adapters(model: nn.Module, config: LoraConfig, *, base_id: str, seed: int) -> Any:
    """A peft model around `model` in which only adapters train; the same random weights on every rank.

    `base_id` is written into the adapter's config. Raises ConfigError if `target_modules` names no layer of the model.
    """
    import peft
    import torch

    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    for target in config.target_modules:
        if target not in linear:
            near = difflib.get_close_matches(target, linear, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"lora.target_modules names {target!r}, which the model lacks.{hint} Its linear layers: {', '.join(linear)}."
            )
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    for held in adapted.peft_config.values():
        held.base_model_name_or_path = base_id
    return adapted
