"""What Serve is told of a deployment: how many replicas it has, how it changes, and what counts as a change."""

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
SIGNALS_S = 1.0
"""How often replicas tell Serve of their load; its default is ten seconds."""
LOOK_BACK_S = 10.0
GATEWAY_WINDOW_S = 10.0
"""How long Serve keeps a gateway that is to end reachable, so that every HAProxy has let go of it: they ask each 2 s, twice."""
GATEWAY_ENVIRONMENT = {
    # The proxy's own sends then reach the socket without a second event loop in between.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # glibc gives back what bodies of all sizes took: it keeps most of that otherwise, and a gateway seems to grow for hours.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(GATEWAY_WINDOW_S),
}


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
    own = replace(pool.config, replicas=1, autoscaling=None, surge_percent=0)
    # What gateways go by, and replicas do not.
    own = replace(own, requests_per_replica=None, max_queued=0, hold_s=0.0)
    return version_of(replace(pool, config=own), *told)


def gateway_view(model: ServedModel) -> ServedModel:
    """A model without what only its replicas need to know: gateways are replaced when what they are told is another."""
    config = model.config
    used = find_engine(config.engine).requests.arguments
    args = {key: value for key, value in config.engine_args.items() if key in used}
    prefill = config.prefill and PrefillConfig(min_bytes=config.prefill.min_bytes)
    scaling = config.autoscaling and AutoscalingConfig(min_replicas=min(1, config.autoscaling.min_replicas))
    config = replace(config, engine_args=args, env={}, prefill=prefill, autoscaling=scaling)
    return replace(model, config=replace(config, replicas=1, surge_percent=0, cpus_per_replica=1.0))


def version_of(*told: Any) -> str:
    """Names what a replica is told when it is made, and this package's code."""
    return digest([code(), json.loads(json.dumps(told, default=_plain))])[:16]


@functools.cache
def code() -> str:
    """Names this package's code, as it lies here."""
    package = Path(__file__).parents[1]
    return digest([[path.relative_to(package).as_posix(), file_digest(path)] for path in sorted(package.rglob("*.py"))])


def _plain(value: Any) -> Any:
    return asdict(value)
