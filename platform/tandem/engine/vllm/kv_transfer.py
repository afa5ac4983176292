"""KV cache transfer between vLLM replicas by its NIXL connector, for `models[].prefill`.

NIXL moves caches between GPUs over RDMA or NVLink, between CPU replicas over shared memory or TCP. Follows vLLM's description of
disaggregated prefilling.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from tandem.config import ServedModelConfig
from tandem.errors import ConfigError

CONNECTOR = "NixlConnector"


def engine_args(config: ServedModelConfig) -> dict[str, Any]:
    """The model's `engine_args` with the NIXL connector, unless they name another."""
    if "kv_transfer_config" in config.engine_args:
        return dict(config.engine_args)
    # A cache whose replica has ended cannot be fetched: the replica that needs it computes it.
    connector = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    if not config.gpus_per_replica:
        connector["kv_buffer_device"] = "cpu"
    return {**config.engine_args, "kv_transfer_config": connector}


def environment(host: str, port: int) -> dict[str, str]:
    """Address at which a replica's connector answers the others' requests for its blocks."""
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": host, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


def check(config: ServedModelConfig, where: str) -> None:
    """ConfigError if the NIXL connector is needed and not installed."""
    if "kv_transfer_config" not in config.engine_args and find_spec("nixl") is None:
        raise ConfigError(
            f"{where}.prefill needs nixl, which moves the KV cache between replicas: `pip install tandem[disaggregation]`, or "
            f"name another connector in {where}.engine_args.kv_transfer_config."
        )
