"""Builds the Serve application: a directory, one deployment of engine replicas for each model, and the gateway in front."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from tandem.config import GatewayConfig, RouterConfig, ServeConfig, ServedModelConfig
from tandem.engine.create import check_engine_args
from tandem.engine.parsers import takes_tools
from tandem.errors import ConfigError, RegistryError
from tandem.ids import fingerprint
from tandem.registry import Registry, RegistryAddress, find_model, is_shared
from tandem.registry.folders import model_max_length
from tandem.registry.source import folder_of
from tandem.serve.directory import Directory
from tandem.serve.disaggregate import pools
from tandem.serve.listen import internal_port_on_node, listen_on_node
from tandem.serve.metrics import QueueMeter, added_latency
from tandem.serve.placement import place
from tandem.serve.policies import find_policy
from tandem.serve.records import ServedModel, Snapshot
from tandem.serve.replica import EngineReplica, check_registry
from tandem.serve.scaling import (
    GATEWAY_ENVIRONMENT,
    engine_options,
    engine_version,
    gateway_options,
    seen_by_gateways,
    version_of,
)
from tandem.serve.sigterm import drain_on_sigterm
from tandem.serve.spec import engine_spec
from tandem.settings import settings

GATEWAY_NAME = "Gateway"
"""Serve's name of the ingress."""
GATEWAY = "tandem.gateway.app"
"""Imported in the gateway's replica only: the gateway stands above this layer, and starts without what is here."""
HEALTH_PERIOD_S = 2.0
"""How often Serve asks a replica whether its engine lives, or a gateway whether it answers."""
HEALTH_TIMEOUT_S = 10.0
"""How long one may take to say so; Serve replaces it after three times."""
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")
CONTROL_CPUS = 0.1
"""What Ray reserves for the directory and each gateway: room to be placed, not a limit."""


def build_app(config: ServeConfig, *, check: bool = True) -> serve.Application:
    """The application that `serve.run` takes.

    Resolves every model in the registry and, with `check`, has the engine check its arguments. Raises ConfigError or
    RegistryError with the next step; no replica has started then.
    """
    return build_pinned(config, check=check)[0]


def build_pinned(config: ServeConfig, *, check: bool = True) -> tuple[serve.Application, ServeConfig]:
    """The same, with the config that each model is named by its version in; without models, with the newest registered one."""
    find_policy(config.router.policy)
    check_shared(settings().registry_url)
    with Registry.open() as opened:
        registry = address_of(opened)
        models = resolve_models(config, opened)
    pinned = replace(config, models=tuple(model.config for model in models))
    return _application(pinned, models, registry, check), pinned


def _application(
    config: ServeConfig, models: list[ServedModel], registry: RegistryAddress, check: bool
) -> serve.Application:
    held = [(pool, f"models[{i}]") for i, model in enumerate(models) for pool in pools(model, f"models[{i}]")]
    placements = [place(pool.config, where) for pool, where in held]
    if check:
        check_engine_args(
            *(engine_spec(pool, f"{where}.engine_args") for pool, where in held if pool.config.engine_args)
        )
    # Of directories there must be one: the old one ends first, and gateways go on with what they know.
    directory = _deployment(Directory, "Directory", version_of(config.version, registry), num_cpus=CONTROL_CPUS).bind(
        None, registry
    )
    engines = [
        _deployment(
            EngineReplica,
            pool.deployment,
            engine_version(pool, config.version, registry, config.drain_timeout_s),
            num_cpus=placement.cpus,
            num_gpus=placement.gpus,
            custom=pool.config.resources_per_replica,
            env=pool.config.env,
            **engine_options(pool, config.drain_timeout_s),
            **placement.options(),
        ).bind(pool, directory, registry, config.drain_timeout_s)
        for (pool, _), placement in zip(held, placements, strict=True)
    ]
    told = (tuple(map(seen_by_gateways, models)), config.gateway, registry)
    more = (config.router, fingerprint(settings().admin_token))
    gateway = _deployment(
        serve.ingress()(Gateway),
        GATEWAY_NAME,
        version_of(config.version, *told, *more),
        num_cpus=CONTROL_CPUS,
        env=GATEWAY_ENVIRONMENT,
        **gateway_options(config.gateway.replicas, config.drain_timeout_s),
    )
    return gateway.bind(directory, *told, engines, *more)


class Gateway:
    """The ingress. Only the wiring is here: what it does is in the gateway package."""

    def __init__(
        self,
        directory: DeploymentHandle[Any],
        models: tuple[ServedModel, ...],
        config: GatewayConfig,
        registry: RegistryAddress,
        engines: list[DeploymentHandle[Any]],
        router: RouterConfig,
        admin: str | None = None,
    ) -> None:
        drain_on_sigterm()
        internal_port_on_node()
        listen_on_node(ray.util.get_node_ip_address())
        # `engines` is not called: naming the replicas here is what makes them a part of the app.
        self._directory = directory
        self._models = models
        self._config = config
        self._registry = registry
        self._router = router
        self._admin = admin

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve in the replica. RegistryError where the app's registry cannot be used on this node."""
        check_registry(self._registry, ray.util.get_node_ip_address())
        return importlib.import_module(GATEWAY).create_app(
            models=self._models,
            watch=self._watch,
            registry=Registry.at(self._registry),
            config=self._config,
            record=added_latency(),
            router=self._router,
            admin=self._admin,
            meter=QueueMeter(),
            tell=self._tell,
            name=_replica_id(),
        )

    async def _watch(self, version: int) -> Snapshot:
        return cast(Snapshot, await self._directory.watch.remote(version))

    async def _tell(self, waiting: dict[str, int]) -> None:
        await self._directory.demand.remote(_replica_id(), waiting)


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def check_shared(registry_url: str) -> None:
    """Refuse an SQLite registry on a cluster of several machines: its file and its locks are of one."""
    if is_shared(registry_url) or not ray.is_initialized():
        return
    machines = sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    if len(machines) > 1:
        raise RegistryError(
            f"This cluster has {len(machines)} nodes ({', '.join(machines[:4])}), and the registry is an SQLite file, which only "
            "one may use. Set TANDEM_DATABASE_URL to a PostgreSQL database, and prepare that with `tandem db upgrade`."
        )


def address_of(registry: Registry) -> RegistryAddress:
    """What replicas open the registry by: an SQLite one on this node only, whatever nodes join the cluster later."""
    alone = not is_shared(registry.url) and ray.is_initialized()
    return replace(registry.address, node=ray.util.get_node_ip_address() if alone else None)


def resolve_models(config: ServeConfig, registry: Registry) -> list[ServedModel]:
    """What the app serves: each model found in the registry, on the hub or on the disk; or else the newest registered one."""
    wanted = config.models
    if not wanted:
        newest = registry.newest_model()
        if newest is None:
            raise RegistryError(
                "There is no model to serve: none is configured and none is registered. Train one with "
                "`tandem train submit`, or name a folder in Hugging Face's format."
            )
        wanted = (ServedModelConfig(model=newest.id, name=newest.name),)
    models = [_with_tools(_resolve(served, registry)) for served in wanted]
    for model in models:
        if sum(other.name == model.name or other.id == model.id for other in models) > 1:
            raise ConfigError(
                f"models: {model.name!r} ({model.id}) is served more than once; raise its `replicas` instead."
            )
    return models


def _resolve(served: ServedModelConfig, registry: Registry) -> ServedModel:
    if served.engine == "echo":
        # It reads no files: with a name for clients, or a path, it needs no model.
        if (folder := folder_of(served.model)) is not None:
            name = served.name or folder.name
            return ServedModel(id=name, name=name, path=str(folder), config=served)
        if served.name:
            return ServedModel(id=served.model, name=served.name, path="", config=served)
    record = find_model(served.model, registry, "models")
    if isinstance(record, Path):
        name = served.name or record.name
        return ServedModel(
            id=name, name=name, path=str(record), config=served, max_length=_length(served, _positions(record))
        )
    if record.kind != "model":
        raise ConfigError(
            f"models: {record.id} is an adapter. Serve its base, {record.base}: the adapter then answers by its name."
        )
    return ServedModel(
        id=record.id,
        name=served.name or record.name,
        path=str(record.path),
        # However it was named, the same version is the same deployment.
        config=replace(served, model=record.id, name=served.name or record.name),
        max_length=_length(served, record.max_length),
        created=int(record.created_at.timestamp()),
    )


def _length(served: ServedModelConfig, model_length: int | None) -> int | None:
    """Tokens that a served model takes: `max_model_len` of its engine, else those of the model."""
    given = served.engine_args.get("max_model_len")
    return given if isinstance(given, int) and given > 0 else model_length


def _positions(folder: Path) -> int | None:
    # vLLM loads more kinds of weights than the registry takes.
    with contextlib.suppress(RegistryError):
        return model_max_length(folder)
    return None


def _with_tools(model: ServedModel) -> ServedModel:
    if model.config.engine == "echo":
        return model
    return replace(model, tools=takes_tools(Path(model.path), model.config.engine_args))


def _deployment(
    cls: Any,
    name: str,
    version: str,
    *,
    num_cpus: float,
    num_gpus: float = 0.0,
    custom: dict[str, float] | None = None,
    env: dict[str, str] | None = None,
    **options: Any,
) -> serve.Deployment:
    resources: dict[str, Any] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if custom:
        resources["resources"] = dict(custom)
    if env:
        resources["runtime_env"] = {"env_vars": env}
    deployment = cast(
        serve.Deployment,
        serve.deployment(
            cls,
            name=name,
            ray_actor_options=resources,
            logging_config=QUIET,
            # Requests do not pass through Serve's queues: the gateway's replicas admit all that HAProxy hands them.
            max_ongoing_requests=100_000,
            health_check_period_s=HEALTH_PERIOD_S,
            health_check_timeout_s=HEALTH_TIMEOUT_S,
            **options,
        ),
    )
    # Without it `serve.run` draws a new one each time, and replaces every replica of an app that is deployed again.
    deployment._version = version
    return deployment
