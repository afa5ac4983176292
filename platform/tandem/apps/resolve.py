"""Resolution of an app's config: every model name becomes a version with its files, once for each deploy."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from tandem.config import AUTO_ENGINE, ServeConfig, ServedModelConfig
from tandem.engine.engines import find_engine, select_engine
from tandem.errors import ConfigError, RegistryError
from tandem.registry import Registry, RegistryAddress, find_model, is_shared
from tandem.registry.folders import config_max_length, model_config, model_max_length
from tandem.registry.hub.reference import SCHEME
from tandem.registry.model_cache import ModelCache, describe
from tandem.registry.source import folder_of
from tandem.routing.policies import find_policy
from tandem.routing.records import ServedModel
from tandem.settings import settings
from tandem.storage import base_name, is_remote


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedApp:
    """An app whose models are known by version and files."""

    config: ServeConfig
    """The config, with each model named by its version: resolving it again gives the same. `engine: auto` stays, so that
    another model may have another engine."""
    models: tuple[ServedModel, ...]
    """With the engine that serves each."""
    registry: RegistryAddress
    """Address by which replicas open the registry."""


def resolve(config: ServeConfig) -> ResolvedApp:
    """Find the files of each model in the registry, on the hub or on disk; without models, the newest registered one.

    Raises ConfigError or RegistryError with the next step.
    """
    find_policy(config.router.policy)
    check_shared(settings().registry_url)
    with Registry.open() as registry:
        models = tuple(resolve_models(config, registry))
        address = address_of(registry)
    engines = [model.engine for model in config.models] or [AUTO_ENGINE]
    named_models = [replace(model.config, engine=engine) for model, engine in zip(models, engines, strict=True)]
    return ResolvedApp(config=replace(config, models=tuple(named_models)), models=models, registry=address)


def check_shared(registry_url: str) -> None:
    """RegistryError for an SQLite registry on a cluster of several machines: its file and its locks belong to one."""
    if is_shared(registry_url) or not ray.is_initialized():
        return
    machines = sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]})
    if len(machines) > 1:
        raise RegistryError(
            f"This cluster has {len(machines)} nodes ({', '.join(machines[:4])}), and the registry is an SQLite file, which only "
            "one may use. Set TANDEM_DATABASE_URL to a PostgreSQL database, and prepare that with `tandem db upgrade`."
        )


def address_of(registry: Registry) -> RegistryAddress:
    """The address by which replicas open the registry; an SQLite one is bound to this node, whatever nodes join later."""
    single_node = not is_shared(registry.url) and ray.is_initialized()
    return replace(registry.address, node=ray.util.get_node_ip_address() if single_node else None)


def resolve_models(config: ServeConfig, registry: Registry) -> list[ServedModel]:
    """The app's models with their files and engines; the newest registered one where the config names none."""
    configs = config.models
    if not configs:
        newest = registry.newest_model()
        if newest is None:
            raise RegistryError(
                "There is no model to serve: none is configured and none is registered. Train one with "
                "`tandem train submit`, or name a folder in Hugging Face's format."
            )
        configs = (ServedModelConfig(model=newest.id, name=newest.name),)
    models = [
        _with_engine(_resolve_model(model_config, registry), f"models[{index}].engine")
        for index, model_config in enumerate(configs)
    ]
    for model in models:
        if sum(other.name == model.name or other.id == model.id for other in models) > 1:
            raise ConfigError(
                f"models: {model.name!r} ({model.id}) is served more than once; raise its `replicas` instead."
            )
    return models


def _resolve_model(config: ServedModelConfig, registry: Registry) -> ServedModel:
    if is_remote(config.model) and not config.model.startswith(SCHEME):
        return _remote_model(config)
    if config.engine != AUTO_ENGINE and not find_engine(config.engine).needs_files:
        if (folder := folder_of(config.model)) is not None:
            name = config.name or folder.name
            return ServedModel(id=name, name=name, path=str(folder), config=config)
        if config.name:
            return ServedModel(id=config.model, name=config.name, path="", config=config)
    record = find_model(config.model, registry, "models")
    if isinstance(record, Path):
        name = config.name or record.name
        length = _served_length(config, _folder_length(record))
        return ServedModel(id=name, name=name, path=str(record), config=config, max_length=length)
    if record.kind != "model":
        raise ConfigError(
            f"models: {record.id} is an adapter. Serve its base, {record.base}: the adapter then answers by its name."
        )
    name = config.name or record.name
    return ServedModel(
        id=record.id,
        name=name,
        path=str(record.path),
        # Whatever name led to it, one version is one deployment.
        config=replace(config, model=record.id, name=name),
        max_length=_served_length(config, record.max_length),
        created=int(record.created_at.timestamp()),
        tenant=record.tenant,
    )


def _remote_model(config: ServedModelConfig) -> ServedModel:
    """A model in an object store: what is not weights is read now, and each node that has a replica fetches the rest."""
    remote = describe(config.model)
    folder = ModelCache.open().fetch_metadata(remote)
    name = config.name or base_name(remote.uri)
    return ServedModel(
        id=name,
        name=name,
        path=str(folder),
        config=config,
        uri=remote.uri,
        fingerprint=remote.fingerprint,
        max_length=_served_length(config, config_max_length(model_config(folder))),
    )


def _served_length(config: ServedModelConfig, model_length: int | None) -> int | None:
    """Tokens that a served model takes: `max_model_len` of its engine, else those of the model."""
    max_model_len = config.engine_args.get("max_model_len")
    return max_model_len if isinstance(max_model_len, int) and max_model_len > 0 else model_length


def _folder_length(folder: Path) -> int | None:
    # vLLM loads more kinds of weights than the registry takes.
    with contextlib.suppress(RegistryError):
        return model_max_length(folder)
    return None


def _with_engine(model: ServedModel, key: str) -> ServedModel:
    engine = select_engine(model.config.engine, Path(model.path), key)
    features = engine.model_features(Path(model.path), model.config.engine_args)
    return replace(model, config=replace(model.config, engine=engine.name), supports_tools=features.tools)
