"""Serve application of an app's plan: a directory, deployments of engine replicas, and the gateway in front of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from tandem.apps.dispatch import ControlPlane
from tandem.apps.gateway import Gateway
from tandem.apps.plan import AppPlan, EngineDeployment, plan
from tandem.apps.resolve import resolve
from tandem.cluster.health.cordons import placement_selector
from tandem.cluster.health.nodes import examine_serving
from tandem.config import ServeConfig
from tandem.engine.create import check_engine_args
from tandem.engine.engines import find_engine, unsupported_shape
from tandem.errors import ConfigError
from tandem.ids import fingerprint
from tandem.secret_values import without_references
from tandem.serve.replica.deployment import EngineReplica
from tandem.serve.scaling import (
    GATEWAY_ENVIRONMENT,
    engine_options,
    engine_version,
    gateway_options,
    gateway_view,
    version_of,
)
from tandem.settings import settings

DIRECTORY_NAME, GATEWAY_NAME = "Directory", "Gateway"
"""Serve's names of the deployments beside the engines."""
HEALTH_PERIOD_S = 2.0
"""Seconds between two health checks of a replica by Serve."""
HEALTH_TIMEOUT_S = 10.0
"""Seconds that one check may take; Serve replaces a replica after three failures."""
LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")
log = logging.getLogger("ray.serve")
CONTROL_CPUS = 0.1
"""CPUs that Ray reserves for the directory and for each gateway: for placement, not a limit."""


def prepare(config: ServeConfig, *, check: bool = True) -> AppPlan:
    """Resolve an app's models once, plan its deployments and, with `check`, have the engines validate their arguments.

    Raises ConfigError or RegistryError with the next step; nothing has started then.
    """
    planned = plan(resolve(config))
    for index, model in enumerate(planned.app.models):
        if model.config.prefill is not None:
            find_engine(model.config.engine).kv_transfer.check(model.config, f"models[{index}]")
    for deployment in planned.engines:
        if reason := unsupported_shape(
            find_engine(deployment.spec.kind), Path(deployment.spec.path), deployment.spec.gpus
        ):
            raise ConfigError(f"{deployment.key}: {deployment.model.name} cannot be served. {reason}")
    if check:
        check_engine_args(*(deployment.spec for deployment in planned.engines if deployment.model.config.engine_args))
    return planned


def build_app(config: ServeConfig, *, check: bool = True) -> serve.Application:
    """The application that `serve.run` takes; raises what `prepare` raises. Logs what the cluster's nodes lack for it."""
    planned = prepare(config, check=check)
    for text in missing_on_nodes(planned):
        log.warning(text)
    return application(planned)


def missing_on_nodes(planned: AppPlan) -> list[str]:
    """What nodes of the connected cluster lack for serving an app, such as HAProxy; nothing without a cluster."""
    if not ray.is_initialized():
        return []
    by_text: dict[str, list[str]] = {}
    for node, finding in examine_serving(planned.app.config.drain_timeout_s):
        by_text.setdefault(f"{finding.says}. {finding.fix}", []).append(node.address)
    return [f"{', '.join(sorted(set(addresses)))}: {text}" for text, addresses in by_text.items()]


def application(planned: AppPlan) -> serve.Application:
    """The Serve application of a plan. Its replicas are placed on nodes that are not cordoned now."""
    config, registry = planned.app.config, planned.app.registry
    selector = placement_selector()
    work = (config.gateway.files, config.gateway.batches, config.scheduling, config.jobs)
    control_args = (registry, *work, config.internal_tls)
    # There must be one directory at a time: the old one ends first, and gateways keep the replicas that they know.
    directory = _deployment(
        ControlPlane,
        DIRECTORY_NAME,
        version_of(config.version, *control_args),
        num_cpus=CONTROL_CPUS,
        selector=selector,
    ).bind(*control_args)
    engines = [_engine_application(engine, planned, directory, selector) for engine in planned.engines]
    constructor_args = (tuple(map(gateway_view, planned.app.models)), config.gateway, registry)
    more_args = (config.router, fingerprint(settings().admin_token))
    gateway = _deployment(
        serve.ingress()(Gateway),
        GATEWAY_NAME,
        version_of(config.version, *constructor_args, *more_args),
        num_cpus=CONTROL_CPUS,
        env=GATEWAY_ENVIRONMENT,
        selector=selector,
        **gateway_options(config.gateway.replicas, config.drain_timeout_s),
    )
    return gateway.bind(directory, *constructor_args, engines, *more_args)


def _engine_application(
    engine: EngineDeployment, planned: AppPlan, directory: serve.Application, selector: Mapping[str, str]
) -> serve.Application:
    config, registry = planned.app.config, planned.app.registry
    return _deployment(
        EngineReplica,
        engine.model.deployment,
        engine_version(engine.model, config.version, registry, config.drain_timeout_s, config.internal_tls),
        num_cpus=engine.placement.cpus,
        num_gpus=engine.placement.gpus,
        custom_resources=engine.model.config.resources_per_replica,
        env=engine.model.config.env,
        selector=selector,
        **engine_options(engine.model, config.drain_timeout_s),
        **engine.placement.options(),
    ).bind(engine.model, directory, registry, config.drain_timeout_s)


def _deployment(
    cls: Any,
    name: str,
    version: str,
    *,
    num_cpus: float,
    num_gpus: float = 0.0,
    custom_resources: dict[str, float] | None = None,
    env: dict[str, str] | None = None,
    selector: Mapping[str, str] | None = None,
    **options: Any,
) -> serve.Deployment:
    resources: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if custom_resources:
        resources["resources"] = dict(custom_resources)
    if env:
        resources["runtime_env"] = {"env_vars": without_references(env)}
    if selector and "placement_group_bundles" in options:
        options["placement_group_bundle_label_selector"] = [dict(selector)]
    elif selector:
        resources["label_selector"] = dict(selector)
    deployment = cast(
        serve.Deployment,
        serve.deployment(
            cls,
            name=name,
            ray_actor_options=resources,
            logging_config=LOGGING,
            # Requests do not pass through Serve's queues: the gateway's replicas admit all that HAProxy hands them.
            max_ongoing_requests=100_000,
            health_check_period_s=HEALTH_PERIOD_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            **options,
        ),
    )
    # Without it `serve.run` draws a random version each time, and replaces every replica of an app that is deployed again.
    deployment._version = version
    return deployment
