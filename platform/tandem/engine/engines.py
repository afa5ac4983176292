"""Registry of engines: the descriptor of each by its name in a config, and the engine that `auto` selects for a model."""

from __future__ import annotations

from pathlib import Path

from tandem.config import AUTO_ENGINE
from tandem.engine.descriptor import EngineDescriptor
from tandem.engine.echo.descriptor import ECHO
from tandem.engine.vllm.descriptor import VLLM
from tandem.errors import ConfigError, RegistryError, did_you_mean
from tandem.registry.folders import model_config

ENGINES: dict[str, EngineDescriptor] = {engine.name: engine for engine in (VLLM, ECHO)}
"""`auto` selects the first that serves a model."""


def find_engine(name: str, key: str = "models[].engine") -> EngineDescriptor:
    """The descriptor of the engine `name`; ConfigError with the nearest name if there is none."""
    if name not in ENGINES:
        names = (AUTO_ENGINE, *ENGINES)
        raise ConfigError(f"{key} is {name!r}; it must be one of {', '.join(names)}.{did_you_mean(name, names)}")
    return ENGINES[name]


def select_engine(name: str, folder: Path, key: str = "models[].engine") -> EngineDescriptor:
    """The descriptor of the engine `name`; with `auto`, of the first engine that serves the model in `folder`.

    Raises ConfigError with the architecture and the engines if none serves it, RegistryError if config.json cannot be read.
    """
    if name != AUTO_ENGINE:
        return find_engine(name, key)
    config = model_config(folder)
    for engine in ENGINES.values():
        if engine.serves(config):
            return engine
    architectures = ", ".join(map(str, config.get("architectures") or ())) or "not in its config.json"
    raise ConfigError(
        f"{key} is {AUTO_ENGINE}, and no engine serves the model at {folder}, whose architecture is {architectures}. The engines "
        f"are {', '.join(ENGINES)}. Serve another model, or set {key} to one of them."
    )


def check_engine_name(name: str, key: str = "models[].engine") -> None:
    """ConfigError with the nearest name if `name` is neither `auto` nor an engine."""
    if name != AUTO_ENGINE:
        find_engine(name, key)


def unsupported_shape(engine: EngineDescriptor, folder: Path, gpus: float) -> str | None:
    """The reason why an engine cannot serve the model in a folder on a number of GPUs; None: no reason is known."""
    try:
        return engine.unsupported_shape(model_config(folder), gpus) if engine.needs_files else None
    except RegistryError:
        return None
