"""Descriptor of the echo engine: completions, chats and responses, no model files, no checks beyond its own arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.config import ServedModelConfig
from tandem.engine.descriptor import EngineDescriptor, KvTransfer, ModelFeatures, Placement, Requests, Resources
from tandem.engine.protocol import Engine
from tandem.engine.routes import ENGINE_ROUTES, GENERATE
from tandem.engine.spec import EngineSpec

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def create(spec: EngineSpec) -> Engine:
    """The engine; ConfigError for an argument that it does not take."""
    from tandem.engine.echo.engine import EchoEngine

    return EchoEngine.from_spec(spec)


def validate(specs: Sequence[EngineSpec]) -> list[str | None]:
    """Make each engine, which is cheap; raises ConfigError for the first that does not take its arguments."""
    for spec in specs:
        create(spec)
    return [None] * len(specs)


def placement(config: ServedModelConfig, where: str) -> Placement:
    """One process with the resources in the config."""
    return Placement(cpus=config.cpus_per_replica, gpus=config.gpus_per_replica)


def check_request(model: str, body: Mapping[str, Any], config: ServedModelConfig, supports_tools: bool) -> None:
    """Every request is answered."""


def check_nodes(
    bundles: Sequence[Mapping[str, float]], nodes: Mapping[int, str], engine_args: Mapping[str, Any]
) -> None:
    """One process needs no particular nodes."""


ECHO = EngineDescriptor(
    name="echo",
    routes=tuple(route for route in ENGINE_ROUTES if route.path in ROUTES),
    tasks=(GENERATE,),
    serves=lambda model_config: False,
    create=create,
    validate=validate,
    unsupported_shape=lambda model_config, gpus: None,
    model_features=lambda folder, engine_args: ModelFeatures(tools=True, chat_template=False),
    explain_start_error=lambda message, output: message,
    resources=Resources(placement=placement, num_workers=lambda engine_args: 1, check_nodes=check_nodes),
    requests=Requests(
        check=check_request,
        keeps_priority=lambda engine_args: False,
        explain_error=lambda message, model: message,
        explain_param=lambda param: param,
    ),
    kv_transfer=KvTransfer(
        engine_args=lambda config: dict(config.engine_args),
        environment=lambda host, port: {},
        check=lambda config, where: None,
    ),
    needs_files=False,
)
