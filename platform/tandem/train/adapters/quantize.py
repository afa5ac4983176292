"""4-bit base models for QLoRA (Dettmers et al. 2023): frozen linear layers in NF4, under trained adapters.

bitsandbytes packs NormalFloat in blocks of 64 with 8-bit scales, about 4.1 bits a weight. Packed weights are bytes, so FSDP2
shards them without a cast; each layer keeps its scales. The output layer and embeddings are not quantized.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tandem.errors import ConfigError, EnvironmentProblem
from tandem.train.model.precision import COMPUTE_DTYPES


def load_nf4(base: Path, precision: str, device: torch.device) -> nn.Module:
    """The model in `base` on `device`, with quantized linear layers that compute in `precision`.

    Raises EnvironmentProblem if bitsandbytes is not installed, ConfigError if the model cannot be loaded in 4 bits.
    """
    try:
        import bitsandbytes  # noqa: F401 - transformers imports it only much later
    except ImportError as error:
        raise EnvironmentProblem(
            "lora.quantize 'nf4' needs bitsandbytes, which is not installed here. `pip install 'tandem[gpu]'` brings it."
        ) from error
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE_DTYPES.get(precision, torch.float32),
        bnb_4bit_quant_storage=torch.uint8,
    )
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=quantization, device_map={"": device}
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.base {base} cannot be loaded in 4 bits: {error}") from error
    return model


def count_weights(parameter: Any) -> int:
    """Number of weights in a parameter, packed or not."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else int(parameter.numel())
