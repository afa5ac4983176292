"""Prefill on replicas of its own: what both kinds of replica are told, so that a prompt's KV cache can move between them.

vLLM's NIXL connector moves it: between GPUs over RDMA or NVLink, between CPU replicas over shared memory or TCP. A gateway
asks a prefill replica for one token first; its answer says where the cache lies, and goes along to the replica that
generates, which fetches it. Follows vLLM's own description of disaggregated prefilling.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from tandem.config import ServedModelConfig
from tandem.errors import ConfigError
from tandem.routing.records import ServedModel

CONNECTOR = "NixlConnector"


def pools(model: ServedModel, where: str) -> list[ServedModel]:
    """The replicas of a model by kind: those that generate, then those that only read prompts, if it has such."""
    config = model.config
    if config.prefill is None:
        return [model]
    if config.engine == "vllm" and "kv_transfer_config" not in config.engine_args and find_spec("nixl") is None:
        raise ConfigError(
            f"{where}.prefill needs nixl, which moves the KV cache between replicas: `pip install tandem[disaggregation]`, or "
            f"name another connector in {where}.engine_args.kv_transfer_config."
        )
    first = config.prefill
    generating = replace(config, engine_args=_connected(config))
    prefilling = replace(
        config,
        autoscaling=None,
        replicas=first.replicas,
        cpus_per_replica=_or(first.cpus_per_replica, config.cpus_per_replica),
        gpus_per_replica=_or(first.gpus_per_replica, config.gpus_per_replica),
        engine_args={**generating.engine_args, **first.engine_args},
    )
    return [replace(model, config=generating), replace(model, config=prefilling, is_prefill=True)]


def environment(host: str, port: int) -> dict[str, str]:
    """Where a replica's connector waits for the others to ask for its blocks."""
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


def _connected(config: ServedModelConfig) -> dict[str, Any]:
    if config.engine != "vllm" or "kv_transfer_config" in config.engine_args:
        return dict(config.engine_args)
    # A cache that cannot be fetched, since the replica that has it ends, is computed where it is needed.
    connector = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if not config.gpus_per_replica:
        connector["kv_buffer_device"] = "cpu"
    return {**config.engine_args, "kv_transfer_config": connector}


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
