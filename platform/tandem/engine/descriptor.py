"""Engine descriptor: the properties of an engine that the platform uses without importing the engine.

Each engine has a folder with a `descriptor.py`, and an entry in `engine.engines.ENGINES`; no other module asks for an engine by
its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.config import ServedModelConfig
from tandem.engine.protocol import Engine
from tandem.engine.routes import EngineRoute
from tandem.engine.spec import EngineSpec
from tandem.errors import TandemError


class UnsupportedRequestError(TandemError):
    """A request that an engine cannot answer with the settings of its model."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param
        """Field of the request that is the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Resources that Ray reserves for one replica."""

    cpus: float
    gpus: float
    """GPUs of the replica's own process; with `bundles` the engine's workers hold the GPUs."""
    bundles: tuple[Mapping[str, float], ...] = ()
    """A placement group, the replica in its first bundle and one worker in each other; empty: one process's resources."""
    strategy: str = "PACK"

    def options(self) -> dict[str, Any]:
        """Arguments of `serve.deployment`, without the actor's own resources."""
        if not self.bundles:
            return {}
        return {
            "placement_group_bundles": [dict(bundle) for bundle in self.bundles],
            "placement_group_strategy": self.strategy,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Computes the resources of an engine's replicas from a model's config."""

    placement: Callable[[ServedModelConfig, str], Placement]
    """Resources of one replica; ConfigError, with the key given, if the engine's arguments and the resources do not fit."""
    num_workers: Callable[[Mapping[str, Any]], int]
    """Processes that share one replica's model, from `engine_args`."""
    check_nodes: Callable[[Sequence[Mapping[str, float]], Mapping[int, str], Mapping[str, Any]], None]
    """EngineError if Ray has placed bundles on nodes (by index) in a way that the engine cannot work with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFeatures:
    """Features of a served model that its engine derives from the model's files."""

    tools: bool
    """Whether requests may have tools."""
    chat_template: bool
    """Whether the engine applies a chat template to messages."""
    described: Mapping[str, str] = field(default_factory=dict)
    """Settings that the engine derives, each with the reason, for terminal output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Rules of an engine for the requests that it takes, used by gateways."""

    check: Callable[[str, Mapping[str, Any], ServedModelConfig, bool], None]
    """UnsupportedRequestError for a body that the engine would refuse or die of; takes the model's name, the body, the model's
    config and whether the model supports tools."""
    keeps_priority: Callable[[Mapping[str, Any]], bool]
    """Whether the engine itself schedules by `priority`, from `engine_args`."""
    explain_error: Callable[[str, str | None], str]
    """An engine's error message for clients; takes the message and the model's name."""
    explain_param: Callable[[str | None], str | None]
    """The field of the request that an engine's error names, for clients."""
    arguments: tuple[str, ...] = ()
    """Names in `engine_args` on which these rules depend; gateways get no others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KvTransfer:
    """Support of an engine for moving KV caches between replicas (`models[].prefill`)."""

    engine_args: Callable[[ServedModelConfig], dict[str, Any]]
    """The model's `engine_args` with the connector."""
    environment: Callable[[str, int], dict[str, str]]
    """Environment variables of a replica on a host, with a free port for the connector."""
    check: Callable[[ServedModelConfig, str], None]
    """ConfigError, with the key given, if this installation cannot move caches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineDescriptor:
    """An engine as the rest of the platform knows it."""

    name: str
    """Value of `engine` in a config."""
    routes: tuple[EngineRoute, ...]
    """Routes of the engine's app for clients."""
    tasks: tuple[str, ...]
    """Tasks that the engine may have; each replica reports those of its model."""
    serves: Callable[[Mapping[str, Any]], bool]
    """Whether `engine: auto` may select the engine for a model, from the model's config.json; False for every model: the engine
    is used by name only."""
    create: Callable[[EngineSpec], Engine]
    """The engine, not started; imports its libraries. ConfigError for arguments that it does not take."""
    validate: Callable[[Sequence[EngineSpec]], list[str | None]]
    """The error in each spec's arguments, None if there is none; imports no heavy library into this process."""
    unsupported_shape: Callable[[Mapping[str, Any], float], str | None]
    """The reason why the engine cannot serve a model, from its config.json, on a number of GPUs; None: no reason is known."""
    model_features: Callable[[Path, Mapping[str, Any]], ModelFeatures]
    """Features of a served model, from its folder and its `engine_args`."""
    explain_start_error: Callable[[str, str], str]
    """The message of a failed start with its cause; takes the message and the output of the engine's processes."""
    resources: Resources
    requests: Requests
    kv_transfer: KvTransfer
    needs_files: bool = True
    """Whether the engine reads a model's folder; otherwise any name can be served."""
    dora: bool = False
    """Whether the engine serves DoRA adapters."""
    validation_packages: tuple[str, ...] = field(default=())
    """Python packages whose versions decide what `validate` finds."""
