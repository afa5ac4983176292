"""Checks a folder before it is registered, and reads from it what the registry keeps. Never imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.config.layout import ModelShape
from tandem.errors import RegistryError


def model_max_length(folder: Path) -> int | None:
    """The positions of the model in `folder`; RegistryError if it is not a model in Hugging Face's format."""
    config = _read(folder, "config.json", "model")
    if not any(folder.glob("*.safetensors")):
        raise RegistryError(
            f"{folder} holds no *.safetensors file, so it is not a model that can be served. "
            "Save it with save_pretrained()."
        )
    # Multimodal configs keep the language model's numbers one level down.
    for values in (config, config.get("text_config")):
        length = values.get("max_position_embeddings") if isinstance(values, dict) else None
        if isinstance(length, int) and not isinstance(length, bool):
            return length
    return None


def model_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`, by its config.json; RegistryError if that cannot be read."""
    return ModelShape.read(_read(folder, "config.json", "model"))


def adapter_rank(folder: Path) -> int:
    """The rank of the LoRA adapter in `folder`; RegistryError if it is not one in peft's format."""
    config = _read(folder, "adapter_config.json", "adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise RegistryError(
            f"{folder} holds no adapter_model.safetensors, so it is not an adapter that can be served. "
            "Save it with peft's save_pretrained()."
        )
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise RegistryError(f"{folder / 'adapter_config.json'}: r is {rank!r}; it must be a rank of at least 1.")
    return rank


def is_dora(folder: Path) -> bool:
    """Whether the adapter in `folder` is a DoRA one, which peft takes and vLLM does not."""
    return _read(folder, "adapter_config.json", "adapter").get("use_dora") is True


def _read(folder: Path, name: str, kind: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise RegistryError(f"There is no folder {folder}, so no {kind} to register.")
    path = folder / name
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        other = "model" if kind == "adapter" else "adapter"
        other_file = "config.json" if kind == "adapter" else "adapter_config.json"
        hint = f" It has {other_file}: register it as {other}." if (folder / other_file).is_file() else ""
        raise RegistryError(f"{folder} holds no {name}, so it is not a {kind}.{hint}") from error
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise RegistryError(f"{path} holds a {type(values).__name__}; it must be a JSON object.")
    return values
