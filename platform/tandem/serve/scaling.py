"""What Serve is told of a deployment: how many replicas it has, how it changes, and what counts as a change. Pure."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, replace
from typing import Any

from ray.serve.config import AutoscalingConfig as ServeAutoscaling
from ray.serve.config import AutoscalingPolicy

import tandem
from tandem.ids import digest
from tandem.serve.records import ServedModel
from tandem.serve.replica import STOP_S

POLICY = "tandem.serve.autoscale:EnginePolicy"
SIGNALS_S = 1.0
"""How often replicas tell Serve of their load; its default is ten seconds."""
LOOK_BACK_S = 10.0
GATEWAY_WINDOW_S = 30.0
"""How long Serve keeps a gateway that is to end reachable at least, so that every HAProxy has let go of it."""


def engine_options(pool: ServedModel, drain_timeout_s: float) -> dict[str, Any]:
    """Options of a deployment of engines: their number or what it follows, and that new ones come before old ones go."""
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": drain_timeout_s + STOP_S,
        "max_surge_percent": pool.config.surge_percent,
    }
    if pool.config.autoscaling is None:
        return {**options, "num_replicas": pool.config.replicas}
    return {**options, "autoscaling_config": serve_autoscaling(pool)}


def gateway_options(replicas: int, drain_timeout_s: float) -> dict[str, Any]:
    """Options of the ingress."""
    return {
        "num_replicas": replicas,
        "max_surge_percent": 100,
        "graceful_shutdown_timeout_s": GATEWAY_WINDOW_S + drain_timeout_s + STOP_S,
    }


def serve_autoscaling(pool: ServedModel) -> ServeAutoscaling:
    """Serve's own config, with every decision left to the policy."""
    config = pool.config.autoscaling
    if config is None:
        raise ValueError(f"{pool.id} does not scale.")
    with warnings.catch_warnings():
        # Serve would rather be told by variables of the whole cluster how often signals travel.
        warnings.simplefilter("ignore", DeprecationWarning)
        return ServeAutoscaling(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            initial_replicas=config.initial_replicas,
            metrics_interval_s=SIGNALS_S,
            look_back_period_s=LOOK_BACK_S,
            # The delays are the decider's.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=asdict(config)),
        )


def engine_version(pool: ServedModel, *told: Any) -> str:
    """Names what a replica was made from: with another name it is replaced. How many there are does not count."""
    return version_of(replace(pool, config=replace(pool.config, replicas=1, autoscaling=None, surge_percent=0)), *told)


def version_of(*told: Any) -> str:
    """Names what a replica is told when it is made, and this package's version."""
    return digest([tandem.__version__, json.loads(json.dumps(told, default=_plain))])[:16]


def _plain(value: Any) -> Any:
    return asdict(value)
