"""Config of a model's replicas: engine, resources, adapters, engine arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

AUTO_ENGINE = "auto"
"""Value of `engine` that leaves the choice to the model's architecture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """Settings of served replicas and of batch runs; `ServedModelConfig` validates them."""

    engine: str = AUTO_ENGINE
    """auto (the engine that serves the model's architecture), vllm, or echo (answers with the prompt; for tests)."""
    replicas: int = 1
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    resources_per_replica: dict[str, float] = field(default_factory=dict)
    """Custom resources that Ray reserves for each replica, by their names in the cluster."""
    max_adapters: int = 8
    """Adapters that one replica uses at once: slots in its engine."""
    max_cached_adapters: int | None = None
    """Adapters that one replica keeps in host memory, including those in slots; unset: four times max_adapters."""
    max_lora_rank: int = 64
    """Largest rank of an adapter."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """The engine's own arguments, by vLLM's names; validated before a replica starts."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the replica, such as VLLM_CPU_KVCACHE_SPACE. A secret stands in no config: `env:NAME` as a value
    means the node's variable NAME, and `file:PATH` the content of a file there."""
