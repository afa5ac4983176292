"""Construction of the model to train: a new one of the configured shape, or a base that is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tandem.config import ModelConfig
from tandem.data.tokenize import TextEncoder
from tandem.errors import ConfigError
from tandem.train.adapters.quantize import count_weights


def build_model(config: ModelConfig, base: Path | None, encoder: TextEncoder, seed: int) -> nn.Module:
    """A causal LM in float32 on the CPU: `base` loaded, or a new one of `config`'s shape, the same on every rank.

    Raises ConfigError if `base` cannot be loaded.
    """
    # Imported here: programs that only read configs start without it.
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    if base is None:
        return new_model(config, encoder)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.base {base} cannot be loaded: {error}") from error
    return model


def new_model(config: ModelConfig, encoder: TextEncoder) -> nn.Module:
    """A stock transformers model with random weights; its vocabulary is the tokenizer's."""
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    shape: dict[str, Any] = {
        "vocab_size": encoder.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": encoder.token_id("bos_token"),
        "eos_token_id": encoder.token_id("eos_token"),
        "pad_token_id": encoder.token_id("pad_token"),
        # Rows of a tied embedding then have a norm of about 1. At the usual 0.02, logits of a narrow model are bounded near 4,
        # and it learned half as fast (a loss of 5.9 instead of 4.3 after 300 steps).
        "initializer_range": config.hidden_size**-0.5,
        "use_cache": True,
    }
    if config.architecture == "qwen3_moe":
        shape |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.moe_intermediate_size,
            # The weights of a token's experts sum to 1, as in the published models.
            "norm_topk_prob": True,
        }
        return cast(nn.Module, Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)))
    if config.architecture == "qwen3":
        return cast(nn.Module, Qwen3ForCausalLM(Qwen3Config(**shape)))
    return cast(nn.Module, LlamaForCausalLM(LlamaConfig(**shape)))


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer blocks of a transformers model, under peft or not."""
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList):
            yield from layers
            return


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers or peft model inside a `ParallelModel`."""
    unwrapped_model: nn.Module = getattr(model, "whole", model)
    return unwrapped_model


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP2 has gathered; no effect on other models.

    After a forward pass without a backward pass, some stay gathered: a later change of the shards would not reach them.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters, and of trained parameters."""
    parameters = list(model.parameters())
    return sum(map(count_weights, parameters)), sum(count_weights(p) for p in parameters if p.requires_grad)
