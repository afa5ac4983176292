"""Resources of a vLLM replica: CPUs, GPUs, the placement group of its workers, and the models that a CPU can serve. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tandem.config import ServedModelConfig
from tandem.engine.descriptor import Placement
from tandem.errors import ConfigError, EngineError

DEGREES = {"tensor": "tensor_parallel_size", "pipeline": "pipeline_parallel_size", "data": "data_parallel_size"}
RAY = "ray"
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's CPU backend has kernels for (0.32, `v1/attention/backends/cpu_attn.py`)."""


def placement(config: ServedModelConfig, where: str = "models[]") -> Placement:
    """Resources of one replica; ConfigError if its degrees and its GPUs do not fit.

    The engine's workers are processes of one node. With `distributed_executor_backend: ray` they are actors in a
    placement group: of one node again (STRICT_PACK) unless there is a pipeline, whose stages may lie on several.
    """
    args = config.engine_args
    degrees = {name: _degree(args, key, where) for name, key in DEGREES.items()}
    world_size = math.prod(degrees.values())
    backend = args.get("distributed_executor_backend")
    product = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "one worker"
    if not config.gpus_per_replica:
        if backend == RAY:
            raise ConfigError(
                f"{where}.engine_args.distributed_executor_backend is ray, which vLLM has for GPUs only, and "
                f"{where}.gpus_per_replica is 0. Leave it out: the {world_size} workers of a CPU replica are processes of one "
                "node."
            )
        if degrees["pipeline"] > 1:
            raise ConfigError(
                f"{where}.engine_args.pipeline_parallel_size is {degrees['pipeline']} and {where}.gpus_per_replica is 0. In "
                "vLLM's CPU build (0.32) the stages after the first die at the first request. Use tensor_parallel_size."
            )
        if world_size > 1 and config.cpus_per_replica < world_size:
            raise ConfigError(
                f"{where}.cpus_per_replica is {config.cpus_per_replica:g}; {product} is {world_size} workers, each with a core "
                f"of its own. Set it to {world_size} or more."
            )
        return Placement(cpus=config.cpus_per_replica, gpus=0.0)
    if config.gpus_per_replica < 1 and world_size == 1 and backend != RAY:
        return Placement(cpus=config.cpus_per_replica, gpus=config.gpus_per_replica)
    if config.gpus_per_replica != world_size:
        raise ConfigError(
            f"{where}.gpus_per_replica is {config.gpus_per_replica:g}; {product} takes {world_size}. Set it to {world_size}, or "
            "change the degrees in engine_args."
        )
    if backend != RAY:
        return Placement(cpus=config.cpus_per_replica, gpus=config.gpus_per_replica)
    if degrees["data"] > 1:
        raise ConfigError(
            f"{where}.engine_args.data_parallel_size is {degrees['data']} with the ray backend. Raise {where}.replicas "
            "instead: each replica then has a placement group of its own."
        )
    workers = tuple({"GPU": 1.0} for _ in range(world_size))
    strategy = "STRICT_PACK" if degrees["pipeline"] == 1 else "PACK"
    return Placement(
        cpus=config.cpus_per_replica,
        gpus=0.0,
        bundles=({"CPU": config.cpus_per_replica}, *workers),
        strategy=strategy,
    )


def check_nodes(
    bundles: Sequence[Mapping[str, float]], nodes: Mapping[int, str], engine_args: Mapping[str, Any]
) -> None:
    """EngineError if a tensor group would lie on two nodes; `nodes` maps the index of each bundle to its node.

    vLLM gives ranks to bundles node by node, so each node's workers must be whole groups.
    """
    tensor_degree = engine_args.get(DEGREES["tensor"], 1)
    workers = Counter(nodes[index] for index, bundle in enumerate(bundles) if bundle.get("GPU"))
    split_nodes = {node: count for node, count in workers.items() if count % tensor_degree}
    if split_nodes:
        placement = ", ".join(f"{count} on {node[:8]}" for node, count in sorted(workers.items()))
        raise EngineError(
            f"A tensor group of {tensor_degree} must lie inside one node, and Ray placed the workers {placement}. Free "
            f"{tensor_degree} GPUs of one node for each stage, or lower tensor_parallel_size."
        )


def unsupported_shape(model_config: Mapping[str, Any], gpus: float) -> str | None:
    """The reason why vLLM cannot serve a model with this config.json on these GPUs; None: no reason is known."""
    if gpus:
        return None
    # Multimodal configs keep the language model's numbers one level down.
    text_config = model_config.get("text_config")
    language_config = text_config if isinstance(text_config, dict) else model_config
    hidden_size, num_heads = language_config.get("hidden_size"), language_config.get("num_attention_heads")
    head_size = language_config.get("head_dim") or (
        hidden_size // num_heads if isinstance(hidden_size, int) and isinstance(num_heads, int) and num_heads else None
    )
    # Latent attention has heads of other widths.
    if not isinstance(head_size, int) or "kv_lora_rank" in language_config or head_size in CPU_HEAD_SIZES:
        return None
    return (
        f"Its attention heads have {head_size} dimensions (head_dim), and vLLM's CPU backend has kernels for "
        f"{', '.join(map(str, CPU_HEAD_SIZES))} only. Train a model with another model.hidden_size / model.num_heads, or serve "
        "it on a GPU."
    )


def num_workers(engine_args: Mapping[str, Any]) -> int:
    """Processes that share one replica's model."""
    return math.prod(int(engine_args.get(key, 1)) for key in DEGREES.values())


def _degree(args: Mapping[str, Any], key: str, where: str) -> int:
    value = args.get(key, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{where}.engine_args.{key} is {value!r}; it must be a whole number from 1.")
    return value
