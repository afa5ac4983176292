"""Validation of model folders before registration; reads config.json, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.config.training.layout import ModelShape
from tandem.errors import RegistryError
from tandem.registry.adapter_files import CONFIG


def model_max_length(folder: Path) -> int | None:
    """The positions of the model in `folder`; RegistryError if it is not a model in Hugging Face's format."""
    config = model_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise RegistryError(
            f"{folder} holds no *.safetensors file, so it is not a model that can be served. "
            "Save it with save_pretrained()."
        )
    return config_max_length(config)


def config_max_length(config: dict[str, Any]) -> int | None:
    """The positions of a model, by its config.json."""
    # Multimodal configs keep the language model's numbers one level down.
    for values in (config, config.get("text_config")):
        length = values.get("max_position_embeddings") if isinstance(values, dict) else None
        if isinstance(length, int) and not isinstance(length, bool):
            return length
    return None


def model_shape(folder: Path) -> ModelShape:
    """The shape of the model in `folder`, by its config.json; RegistryError if that cannot be read."""
    return ModelShape.read(model_config(folder))


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of the model in `folder`; RegistryError if it cannot be read."""
    if not folder.is_dir():
        raise RegistryError(f"There is no folder {folder}, so there is no model.")
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        hint = " It has adapter_config.json: register it as adapter." if (folder / CONFIG).is_file() else ""
        raise RegistryError(f"{folder} holds no config.json, so it is not a model.{hint}") from error
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise RegistryError(f"{path} holds a {type(values).__name__}; it must be a JSON object.")
    return values
