"""Merging of an adapter into the weights of its base: the result is served as a plain model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tandem.data.build import tokenizer_files
from tandem.errors import ConfigError
from tandem.storage import publish_folder


def merge_adapter(base: Path, adapter: Path, target: Path) -> None:
    """Write the model in `base` with `adapter` added into it to `target`, replacing what is there.

    The sum is computed in float32, and stored in the type of the base's weights. Raises ConfigError if they do not match.
    """
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        base_dtype = AutoConfig.from_pretrained(base).dtype or torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{adapter} cannot be merged into {base}: {error}") from error
    with publish_folder(target, replace=True) as staging:
        merged.to(base_dtype).save_pretrained(staging)
        for file in tokenizer_files(base):
            shutil.copyfile(file, staging / file.name)
