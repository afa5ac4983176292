"""Records exchanged between replicas, directory and gateways, and the HTTP headers between gateway and replica. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote, unquote

from tandem.config.serving.app import ServedModelConfig
from tandem.engine.protocol import AdapterRef

State = Literal["ready", "draining", "dead", "stuck", "silent"]
"""`dead`: the engine has ended. `stuck`: the engine has work and completes no step. `silent`: no heartbeats arrive (set by the
directory)."""

TOKEN_HEADER = "x-tandem-token"
"""Carries the replica's own secret; requests without it are refused."""
ADAPTER_HEADER = "x-tandem-adapter"
"""Adapter that a request needs; the replica loads it before its engine gets the request."""
ADAPTER_PATH_HEADER = "x-tandem-adapter-path"
ADAPTER_DIGEST_HEADER = "x-tandem-adapter-digest"
ALIVE_PATH = "/tandem/alive"
"""Liveness route of a replica: 200 if it takes requests, 503 if it does not."""
UNAVAILABLE_HEADER = "x-tandem-unavailable"
"""On a 503 of a replica that has sent no part of an answer: the reason. `draining`, `dead`: it did not begin with the request.
`died`: its engine ended while it had the request. `adapters`: no adapter slot became free in time, or its files are missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One base model of an app with its files resolved: replicas load it, gateways answer to its names."""

    id: str
    """`name@version`, or the bare name for a model that was given as a folder."""
    name: str
    """Name for clients."""
    path: str
    """Folder in Hugging Face's format; of a model with a `uri` one with all files but the weights, until a replica has those."""
    config: ServedModelConfig
    uri: str | None = None
    """The model's folder in an object store, from which each node fetches it."""
    fingerprint: str = ""
    """Of the files below `uri` when the app was deployed (`registry.model_cache`)."""
    max_length: int | None = None
    created: int = 0
    """Seconds since 1970."""
    supports_tools: bool = True
    """Whether the model takes tools."""
    tenant: str | None = None
    """The tenant that it belongs to; None: it is shared by all."""
    is_prefill: bool = False
    """Whether these are prefill replicas, which read prompts for the others."""

    @property
    def pool(self) -> str:
        """Id of the pool that its replicas register in."""
        return prefill_pool(self.id) if self.is_prefill else self.id

    @property
    def scales_to_zero(self) -> bool:
        """Whether the model may have no replica while nobody uses it."""
        return self.config.autoscaling is not None and self.config.autoscaling.min_replicas == 0

    @property
    def deployment(self) -> str:
        """Serve's name of its deployment: the same for all versions. Serve makes file names of it, so it has no slash."""
        return f"{'prefill' if self.is_prefill else 'engine'}-{self.name.replace('/', '~')}"


def model_of_deployment(deployment: str) -> str | None:
    """The name of the model that a deployment (`ServedModel.deployment`) serves; None for prefill replicas and other parts."""
    prefix, _, name = deployment.partition("-")
    return name.replace("~", "/") if prefix == "engine" and name else None


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaRecord:
    """State of one engine replica, as of its last heartbeat."""

    id: str
    pool: str
    """Its pool: the id of the model that it holds, or what `prefill_pool` makes of it."""
    deployment: str = ""
    """Serve's name of its deployment, whose replicas are of two pools during a rolling change of version."""
    url: str
    """`http://host:port` of its engine."""
    token: str = field(repr=False)
    state: State = "ready"
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    """Largest number of requests that its engine generates at once; 0: no limit."""
    kv_usage: float = 0.0
    adapters: tuple[str, ...] = ()
    """Ids of the adapters in its slots or its host memory."""
    slots: tuple[str, ...] = ()
    """Ids of the adapters in its slots."""
    adapter_loads: int = 0
    """Adapter loads since it started."""
    pin_problems: tuple[tuple[str, str], ...] = ()
    """Pinned adapters that it could not load, each with the reason."""
    started_at: float = 0.0
    """Start of its process, seconds since 1970."""
    startup_s: tuple[tuple[str, float], ...] = ()
    """Seconds of each phase of its start: process, files (of a model in a store), imports, engine."""
    tasks: tuple[str, ...] = ()
    """Tasks of its engine (`engine.routes`); empty: not known."""

    @property
    def load(self) -> int:
        """Running and waiting requests."""
        return self.running + self.waiting

    @property
    def lost(self) -> bool:
        """Whether requests in flight there would never end. A dead engine ends its requests by itself."""
        return self.state in ("stuck", "silent")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatReply:
    """The directory's answer to a replica's heartbeat."""

    waiting: int
    """Requests waiting at the gateways for a replica of its deployment."""
    pins: tuple[AdapterRef, ...] | None = None
    """Adapters that are pinned on its base; None: the directory has not read them from the registry yet."""
    resend: bool = False
    """Whether the directory does not know the replica, and needs its whole record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All replicas at one moment."""

    version: int = 0
    """Increases with every change of a replica."""
    epoch: int = 0
    """Identifies the directory's process: versions of different ones are not comparable."""
    complete: bool = True
    """False while the directory has just started: there may be replicas that it has not heard from yet."""
    replicas: tuple[ReplicaRecord, ...] = ()


def prefill_pool(model_id: str) -> str:
    """Id of the pool of a model's prefill replicas; a model id has no `#`."""
    return f"{model_id}#prefill"


def base_of_pool(pool: str) -> str:
    """The id of the model whose replicas a pool has."""
    return pool.removesuffix("#prefill")


def adapter_headers(adapter: AdapterRef) -> dict[str, str]:
    """Request headers that name an adapter; percent-encoded, since header values are ASCII and paths need not be."""
    headers = {ADAPTER_HEADER: quote(adapter.id), ADAPTER_PATH_HEADER: quote(adapter.path)}
    return headers | ({ADAPTER_DIGEST_HEADER: adapter.digest} if adapter.digest else {})


def adapter_from_headers(headers: dict[bytes, bytes]) -> AdapterRef | None:
    """The adapter named in a request's raw headers; None: none."""
    name, path = headers.get(ADAPTER_HEADER.encode()), headers.get(ADAPTER_PATH_HEADER.encode())
    if not name or not path:
        return None
    digest = headers.get(ADAPTER_DIGEST_HEADER.encode(), b"").decode("latin-1") or None
    return AdapterRef(id=unquote(name.decode("latin-1")), path=unquote(path.decode("latin-1")), digest=digest)
