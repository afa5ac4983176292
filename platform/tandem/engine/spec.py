"""Engine spec: model files, names, adapter limits, resources and arguments of one engine. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """Everything that an engine needs to start."""

    kind: str
    """Name of the engine (`engine.engines.ENGINES`)."""
    id: str
    """The model's id: its name in responses, and its first name in requests."""
    name: str
    """Its second name in requests."""
    path: str
    """Folder in Hugging Face's format."""
    max_adapters: int = 8
    """Slots for adapters."""
    max_cached_adapters: int = 8
    """Adapters in host memory; at least as many."""
    max_lora_rank: int = 64
    threads: int = 1
    """CPU threads of one operation."""
    gpus: float = 0.0
    args: Mapping[str, Any] = field(default_factory=dict)
    """The engine's own arguments; they override Tandem's defaults."""
    offline: bool = False
    """Batch use, where no client waits for one answer: vLLM's defaults for its `LLM` class instead of its server."""
    where: str = "engine_args"
    """Place of `args` in the config, for messages."""
