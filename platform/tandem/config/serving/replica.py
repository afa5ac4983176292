"""What one replica of a model is: its engine, what it is given, and how many adapters it takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """The settings that served replicas and those of batch runs have in common; `ServedModelConfig` checks them."""

    engine: str = "vllm"
    """vllm, or echo (answers with the prompt; for tests of what surrounds an engine)."""
    replicas: int = 1
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    resources_per_replica: dict[str, float] = field(default_factory=dict)
    """Other resources that Ray reserves for each replica, by the names that the cluster's nodes give them."""
    max_adapters: int = 8
    """Adapters that one replica answers with at once: slots in its engine."""
    max_cached_adapters: int | None = None
    """Adapters that one replica keeps in host memory, those in slots among them; unset: four times max_adapters."""
    max_lora_rank: int = 64
    """Largest adapter rank that a replica takes."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of vLLM's own engine, by their names there; vLLM checks them before a replica starts."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the replica, such as VLLM_CPU_KVCACHE_SPACE."""
