"""Engine protocol: an ASGI app that speaks OpenAI's API, and methods to start, drain and adapt the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp

if TYPE_CHECKING:
    from tandem.registry import ModelRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRef:
    """An adapter, as engines and replicas identify it."""

    id: str
    """`name@version`; also the `model` of requests that want it."""
    path: str
    """Folder in peft's format, readable on the engine's node; a URI until a replica has downloaded it."""
    digest: str | None = None
    """Digest of its files at registration; None: not known."""

    @classmethod
    def of(cls, record: ModelRecord) -> AdapterRef:
        """A registered adapter."""
        return cls(id=record.id, path=record.location, digest=record.digest)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Load and health of an engine, for router and autoscaler."""

    running: int = 0
    """Requests being generated."""
    waiting: int = 0
    """Requests admitted but not started."""
    max_running: int = 0
    """Largest number of requests generated at once; 0: no limit."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    ttft_s: float = 0.0
    """Seconds to the first token: 9 of 10 of the last `engine.ttft.WINDOW_S` took no longer; 0: there were none."""
    adapters: tuple[str, ...] = ()
    """Ids of the adapters it holds."""
    tasks: tuple[str, ...] = ()
    """Tasks of the engine (`engine.routes`); empty: not known."""
    steps: int = 0
    """Engine steps completed since the start: an engine with work and a constant count is stuck."""
    healthy: bool = True
    """False once the engine cannot answer any more; the replica is then replaced."""


class Engine(Protocol):
    """One loaded model that answers OpenAI requests over `app`, under its own id and those of its adapters."""

    @property
    def app(self) -> ASGIApp:
        """The engine's HTTP app. Valid after `start`; never exposed without a guard."""
        ...

    async def start(self) -> None:
        """Load the model. Raises EngineError with the reason if that cannot work."""
        ...

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Make `adapter.id` answer. Idempotent. Raises EngineError if the adapter cannot be loaded."""
        ...

    async def unload_adapter(self, adapter_id: str) -> None:
        """Forget an adapter; nothing happens if it is not held."""
        ...

    @property
    def healthy(self) -> bool:
        """Whether the engine can answer. Asked for each request, and callable from any thread."""
        ...

    def stats(self) -> EngineStats:
        """The engine's load now. Asked some times a second, and callable from any thread."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Let running requests end, for at most `timeout_s`, then stop the engine."""
        ...
