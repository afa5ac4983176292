"""The seam between the platform and any engine: an ASGI app that speaks OpenAI, and four verbs around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from starlette.types import ASGIApp


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRef:
    """An adapter as an engine needs to know it."""

    id: str
    """`name@version`; also the `model` of requests that want it."""
    path: str
    """Folder in peft's format, readable on the engine's node; until a replica has brought it there, its URI may stand here."""
    digest: str | None = None
    """What its files had when it was registered; None: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine says of itself, for the router."""

    running: int = 0
    """Requests being generated."""
    waiting: int = 0
    """Requests admitted but not started."""
    max_running: int = 0
    """Requests that it generates at once, at most; 0: any number."""
    kv_usage: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    ttft_s: float = 0.0
    """Seconds to the first token: 9 of 10 of the last `engine.ttft.WINDOW_S` took no longer; 0: there were none."""
    adapters: tuple[str, ...] = ()
    """Ids of the adapters it holds."""
    tasks: tuple[str, ...] = ()
    """What it does, in the words of serve.routes; empty: not known."""
    steps: int = 0
    """Steps that have ended since the start: where there is work and this stands still, the engine is stuck."""
    healthy: bool = True
    """False once it cannot answer any more; the replica is then replaced."""


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

    def stats(self) -> EngineStats:
        """The engine's load now. Cheap, and callable from any thread."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Let running requests end, for at most `timeout_s`, then stop the engine."""
        ...
