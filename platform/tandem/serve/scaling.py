"""Serve options of deployments: number of replicas, autoscaling, rolling changes, and versions that cause them."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.config import AutoscalingPolicy

from tandem.config import AutoscalingConfig, PrefillConfig
from tandem.engine.engines import find_engine
from tandem.ids import digest, file_digest
from tandem.routing.records import ServedModel
from tandem.serve.replica.deployment import STOP_S

POLICY = "tandem.serve.autoscale:EnginePolicy"
SIGNAL_INTERVAL_S = 1.0
"""Seconds between two load reports of a replica to Serve; its default is ten."""
LOOK_BACK_S = 10.0
GATEWAY_WINDOW_S = 10.0
"""Seconds for which Serve keeps a stopping gateway reachable, until every HAProxy has removed it (two checks, 2 s apart)."""
GATEWAY_ENVIRONMENT = {
    # Sends reach the socket without a second event loop in between.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # glibc returns the memory of request bodies; otherwise it keeps most of it, and a gateway grows for hours.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(GATEWAY_WINDOW_S),
}


def engine_options(model: ServedModel, drain_timeout_s: float) -> dict[str, Any]:
    """Options of a deployment of engine replicas: fixed number or autoscaling; new replicas start before old ones stop."""
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": drain_timeout_s + STOP_S,
        "max_surge_percent": model.config.surge_percent,
    }
    if model.config.autoscaling is None:
        return {**options, "num_replicas": model.config.replicas}
    return {**options, "autoscaling_config": serve_autoscaling(model)}


def gateway_options(replicas: int, drain_timeout_s: float) -> dict[str, Any]:
    """Options of the ingress."""
    return {
        "num_replicas": replicas,
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": GATEWAY_WINDOW_S + drain_timeout_s + STOP_S,
    }


def serve_autoscaling(model: ServedModel) -> ServeAutoscaling:
    """Serve's autoscaling config, with every decision left to `EnginePolicy`."""
    config = model.config.autoscaling
    if config is None:
        raise ValueError(f"{model.id} does not scale.")
    with warnings.catch_warnings():
        # Serve recommends cluster-wide environment variables for the interval instead.
        warnings.simplefilter("ignore", DeprecationWarning)
        return ServeAutoscaling(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            initial_replicas=config.initial_replicas,
            metrics_interval_s=SIGNAL_INTERVAL_S,
            look_back_period_s=LOOK_BACK_S,
            # `decide` applies the delays.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=asdict(config)),
        )


def engine_version(model: ServedModel, *arguments: Any) -> str:
    """Version of an engine deployment: a change replaces its replicas. Their number does not count."""
    replica_config = replace(model.config, replicas=1, autoscaling=None, surge_percent=0)
    # Used by gateways only.
    replica_config = replace(replica_config, requests_per_replica=None, max_queued=0, hold_s=0.0)
    return version_of(replace(_without_copy(model), config=replica_config), *arguments)


def gateway_view(model: ServedModel) -> ServedModel:
    """A model without the settings that only its replicas use: gateways are replaced when their arguments change."""
    config = model.config
    used_arguments = find_engine(config.engine).requests.arguments
    args = {key: value for key, value in config.engine_args.items() if key in used_arguments}
    prefill = config.prefill and PrefillConfig(min_bytes=config.prefill.min_bytes)
    scaling = config.autoscaling and AutoscalingConfig(min_replicas=min(1, config.autoscaling.min_replicas))
    config = replace(config, engine_args=args, env={}, prefill=prefill, autoscaling=scaling)
    return replace(_without_copy(model), config=replace(config, replicas=1, surge_percent=0, cpus_per_replica=1.0))


def _without_copy(model: ServedModel) -> ServedModel:
    """A model of a store without the path of its files on the node that deploys: another node has another."""
    return model if model.uri is None else replace(model, path="")


def version_of(*arguments: Any) -> str:
    """Digest of a deployment's arguments and of this package's code."""
    return digest([code_digest(), json.loads(json.dumps(arguments, default=_to_plain))])[:16]


@functools.cache
def code_digest() -> str:
    """Digest of this package's files."""
    package = Path(__file__).parents[1]
    return digest([[path.relative_to(package).as_posix(), file_digest(path)] for path in sorted(package.rglob("*.py"))])


def _to_plain(value: Any) -> Any:
    return asdict(value)
