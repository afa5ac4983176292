"""What an engine loads, and how: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What an engine loads, and how."""

    kind: str
    """vllm or echo."""
    id: str
    """The name it answers to in each response, and the first of those it is asked by."""
    name: str
    """The other name it is asked by."""
    path: str
    """Folder in Hugging Face's format."""
    max_adapters: int = 8
    """Slots for adapters."""
    max_cached_adapters: int = 8
    """Adapters in host memory; at least as many."""
    max_lora_rank: int = 64
    threads: int = 1
    """Threads of one operation on the CPU."""
    gpus: float = 0.0
    args: Mapping[str, Any] = field(default_factory=dict)
    """The engine's own arguments; they win over what Tandem would set."""
    offline: bool = False
    """Many prompts and nobody who waits for one of them: vLLM's defaults for its `LLM` instead of those for its server."""
    where: str = "engine_args"
    """What messages call `args`: their place in the app's config."""
