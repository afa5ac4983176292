"""Registry of engines: the descriptor of each, by its name in a config."""

from __future__ import annotations

from tandem.engine.descriptor import EngineDescriptor
from tandem.engine.echo.descriptor import ECHO
from tandem.engine.vllm.descriptor import VLLM
from tandem.errors import ConfigError, did_you_mean

ENGINES: dict[str, EngineDescriptor] = {engine.name: engine for engine in (VLLM, ECHO)}


def find_engine(name: str, key: str = "models[].engine") -> EngineDescriptor:
    """The descriptor of the engine `name`; ConfigError with the nearest name if there is none."""
    if name not in ENGINES:
        raise ConfigError(f"{key} is {name!r}; it must be one of {', '.join(ENGINES)}.{did_you_mean(name, ENGINES)}")
    return ENGINES[name]
