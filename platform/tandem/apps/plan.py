"""Plan of an app: its deployments of engine replicas, each with engine spec and resources. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tandem.apps.resolve import ResolvedApp
from tandem.engine.descriptor import Placement
from tandem.engine.engines import find_engine
from tandem.engine.spec import EngineSpec
from tandem.routing.records import ServedModel
from tandem.serve.engine_spec import engine_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineDeployment:
    """One deployment of engine replicas: a model, or the prefill replicas of one."""

    model: ServedModel
    spec: EngineSpec
    placement: Placement
    key: str
    """Place of the model in the config, such as `models[0]`, for messages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AppPlan:
    """An app that can be deployed."""

    app: ResolvedApp
    engines: tuple[EngineDeployment, ...]


def plan(app: ResolvedApp) -> AppPlan:
    """The deployments of an app; ConfigError if the engines' arguments and the resources in the config do not fit."""
    engines = [
        _engine_deployment(replicas, f"models[{index}]")
        for index, model in enumerate(app.models)
        for replicas in split_prefill(model)
    ]
    return AppPlan(app=app, engines=tuple(engines))


def split_prefill(model: ServedModel) -> list[ServedModel]:
    """The model's deployments: replicas that generate, then those that only read prompts where `prefill` is set."""
    config, prefill = model.config, model.config.prefill
    if prefill is None:
        return [model]
    decode_config = replace(config, engine_args=find_engine(config.engine).kv_transfer.engine_args(config))
    prefill_config = replace(
        config,
        autoscaling=None,
        replicas=prefill.replicas,
        cpus_per_replica=config.cpus_per_replica if prefill.cpus_per_replica is None else prefill.cpus_per_replica,
        gpus_per_replica=config.gpus_per_replica if prefill.gpus_per_replica is None else prefill.gpus_per_replica,
        engine_args={**decode_config.engine_args, **prefill.engine_args},
    )
    return [replace(model, config=decode_config), replace(model, config=prefill_config, is_prefill=True)]


def _engine_deployment(model: ServedModel, key: str) -> EngineDeployment:
    placement = find_engine(model.config.engine).resources.placement(model.config, key)
    return EngineDeployment(model=model, spec=engine_spec(model, f"{key}.engine_args"), placement=placement, key=key)
