"""What replicas, directory and gateways tell each other. Plain data, cheap to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote, unquote

from tandem.config.serving.app import ServedModelConfig
from tandem.engine.protocol import AdapterRef

State = Literal["ready", "draining", "dead", "stuck", "silent"]
"""`dead`: its engine is gone. `stuck`: its engine has work and does nothing. `silent`: it is not heard any more; the directory
says so in its place."""

TOKEN_HEADER = "x-tandem-token"
"""Carries the replica's own secret; without it a replica answers nobody."""
ADAPTER_HEADER = "x-tandem-adapter"
"""The adapter that a request needs; the replica loads it before its engine sees the request."""
ADAPTER_PATH_HEADER = "x-tandem-adapter-path"
ADAPTER_DIGEST_HEADER = "x-tandem-adapter-digest"
ALIVE_PATH = "/tandem/alive"
"""GET it to hear whether a replica lives: 200 if it takes requests, 503 if it does not."""
UNAVAILABLE_HEADER = "x-tandem-unavailable"
"""On a 503 of a replica: it gave no part of an answer, and why. `draining` and `dead`: it did not begin with the request.
`died`: its engine did, while it had the request. `adapters`: no slot came free in time, or the files could not be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One base model of an app, resolved: what its replicas load and what its gateways answer to."""

    id: str
    """`name@version`, or the bare name for a model that was given as a folder."""
    name: str
    """What clients call it."""
    path: str
    """Folder in Hugging Face's format."""
    config: ServedModelConfig
    max_length: int | None = None
    created: int = 0
    """Seconds since 1970."""
    supports_tools: bool = True
    """Whether it takes tools."""
    is_prefill: bool = False
    """Whether these replicas read prompts for the model's others."""

    @property
    def pool(self) -> str:
        """What its replicas register as."""
        return prefill_pool(self.id) if self.is_prefill else self.id

    @property
    def scales_to_zero(self) -> bool:
        """Whether it may be without replicas until somebody asks for it."""
        return self.config.autoscaling is not None and self.config.autoscaling.min_replicas == 0

    @property
    def deployment(self) -> str:
        """Serve's name for its replicas: the same for all its versions. Serve names files after it, so it has no slash."""
        return f"{'prefill' if self.is_prefill else 'engine'}-{self.name.replace('/', '~')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaRecord:
    """One engine replica as it last described itself."""

    id: str
    pool: str
    """Its pool: the id of the model that it holds, or what `prefill_pool` makes of it."""
    deployment: str = ""
    """Serve's name for what it is a replica of. Its replicas may be of several pools while a new version comes."""
    url: str
    """`http://host:port` of its engine."""
    token: str = field(repr=False)
    state: State = "ready"
    running: int = 0
    waiting: int = 0
    max_running: int = 0
    """Requests that its engine generates at once, at most; 0: any number."""
    kv_usage: float = 0.0
    adapters: tuple[str, ...] = ()
    """Ids of the adapters it holds: in slots or in host memory."""
    slots: tuple[str, ...] = ()
    """Those of them that lie in the engine's slots."""
    adapter_loads: int = 0
    """How often it has loaded one since it started."""
    pin_problems: tuple[tuple[str, str], ...] = ()
    """Pinned adapters that it does not keep, each with the reason."""
    started_at: float = 0.0
    """When its process was given to it, in seconds since 1970."""
    startup_s: tuple[tuple[str, float], ...] = ()
    """How long each phase of its start took, in seconds: process, imports, engine."""
    tasks: tuple[str, ...] = ()
    """What its engine does, in the words of serve.routes; empty: not known."""

    @property
    def load(self) -> int:
        """Requests that it works on or keeps waiting."""
        return self.running + self.waiting

    @property
    def lost(self) -> bool:
        """Whether what it was asked would wait for nothing. A dead engine ends its requests by itself."""
        return self.state in ("stuck", "silent")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeartbeatReply:
    """The directory's answer to a replica's heartbeat."""

    waiting: int
    """Requests that wait at the gateways for a replica of its deployment."""
    registry_revision: int | None = None
    """The registry's count of changes; None: not known yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All replicas at one moment."""

    version: int = 0
    """Grows when a replica comes, goes, or changes its state or adapters; mere load does not count."""
    complete: bool = True
    """False as long as the directory has just begun to listen: replicas that it does not name may be there."""
    replicas: tuple[ReplicaRecord, ...] = ()


def prefill_pool(model_id: str) -> str:
    """The pool of the replicas that read prompts for a model; an id never has such a sign."""
    return f"{model_id}#prefill"


def adapter_headers(adapter: AdapterRef) -> dict[str, str]:
    """The headers that ask a replica for an adapter; header values are ASCII, paths need not be."""
    headers = {ADAPTER_HEADER: quote(adapter.id), ADAPTER_PATH_HEADER: quote(adapter.path)}
    return headers | ({ADAPTER_DIGEST_HEADER: adapter.digest} if adapter.digest else {})


def adapter_from_headers(headers: dict[bytes, bytes]) -> AdapterRef | None:
    """The adapter that a request's raw headers ask for."""
    name, path = headers.get(ADAPTER_HEADER.encode()), headers.get(ADAPTER_PATH_HEADER.encode())
    if not name or not path:
        return None
    digest = headers.get(ADAPTER_DIGEST_HEADER.encode(), b"").decode("latin-1") or None
    return AdapterRef(id=unquote(name.decode("latin-1")), path=unquote(path.decode("latin-1")), digest=digest)
