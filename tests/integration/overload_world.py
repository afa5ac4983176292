"""A gateway in front of echo engines with limits set by a test: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from gateway_world import Reflecting
from starlette.applications import Starlette
from starlette.responses import Response

from tandem.config import GatewayConfig, ServedModelConfig
from tandem.engine.echo.engine import EchoEngine
from tandem.gateway.admission.control import Admission
from tandem.gateway.admission.queue import Queue
from tandem.gateway.app import create_app
from tandem.ids import fingerprint
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot, prefill_pool
from tandem.serve.replica.host import EngineHost

ROUTE = "/v1/completions"


class Listening(Reflecting):
    """An echo that knows in which order it was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(("base",), max_length=10_000, **options)
        self.asked: list[str] = []

    async def _answer(self, request: Any, body: dict[str, Any], prompt: str, *, chat: bool) -> Any:
        self.asked.append(prompt.split()[0])
        return await super()._answer(request, body, prompt, chat=chat)


class Mortal(Listening):
    """Its process dies of a request whose prompt is `poison`: before the head of its answer, or, where it streams, after it."""

    def __init__(self, *, light_calls: int = 1, **options: Any) -> None:
        """Of calls that generate nothing it dies too, once there are so many."""
        super().__init__(**options)
        self._light_calls = light_calls

    async def _answer(self, request: Any, body: dict[str, Any], prompt: str, *, chat: bool) -> Any:
        if prompt == "poison" and not body.get("stream"):
            self.die()
        return await super()._answer(request, body, prompt, chat=chat)

    async def _stream(
        self, head: dict[str, Any], tokens: list[str], usage: dict[str, int] | None, *, chat: bool
    ) -> AsyncIterator[bytes]:
        if tokens == ["poison"]:
            self.die()
        async for event in super()._stream(head, tokens, usage, chat=chat):
            yield event

    async def _reflect(self, request: Any) -> Any:
        self.asked.append("other")
        if len(self.asked) >= self._light_calls:
            self.die()
        while self._healthy:
            await asyncio.sleep(0.01)
        return Response(status_code=500)


@dataclass
class World:
    """What a test sees of it."""

    http: httpx.AsyncClient
    app: Starlette
    """The gateway's, which runs."""
    admission: Admission
    queue: Queue
    """The model's."""
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    hosts: list[EngineHost] = field(default_factory=list)
    version: int = 1

    async def watch(self, version: int) -> Snapshot:
        """The directory."""
        if version == self.version:
            await asyncio.sleep(0.01)
        return Snapshot(version=self.version, replicas=tuple(self.records.values()))

    async def add(self, engine: EchoEngine, max_running: int = 0, *, prefills: bool = False) -> ReplicaRecord:
        """A replica, ready; one that only reads prompts if it `prefills`."""
        host = EngineHost(engine, max_adapters=0)
        await host.start()
        self.hosts.append(host)
        record = ReplicaRecord(
            id=f"r{len(self.hosts)}",
            pool=prefill_pool("base") if prefills else "base",
            url=host.url,
            token=host.token,
            max_running=max_running,
        )
        self.records[record.id] = record
        self.version += 1
        await asyncio.sleep(0.1)
        return record

    def ask(self, prompt: str, words: int = 3, headers: dict[str, str] | None = None, **body: Any) -> asyncio.Task[Any]:
        """A request on its way; the prompt's first word names it."""
        text = " ".join([prompt, *["word"] * (words - 1)])
        return asyncio.create_task(
            self.http.post(ROUTE, json={"model": "base", "prompt": text, **body}, headers=headers)
        )

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that must come; AssertionError if it does not."""
        for _ in range(6000):
            if happened():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come within a minute")

    async def queued(self, count: int) -> None:
        """Wait until so many wait."""
        await self.until(lambda: self.admission.waiting() == {"base": count})


@contextlib.asynccontextmanager
async def overload_world(
    folder: Path, gateway: GatewayConfig | None = None, *, admin: str | None = None, **model: Any
) -> AsyncIterator[World]:
    """A gateway for the model `base`, with these keys in its config; `admin`: TANDEM_ADMIN_TOKEN."""
    watched: list[World] = []

    async def watch(version: int) -> Snapshot:
        return await watched[0].watch(version)

    served = ServedModel(
        id="base", name="base", path="", config=ServedModelConfig(**{"model": "base", "engine": "vllm", **model})
    )
    app = create_app(
        models=[served],
        watch=watch,
        registry=Registry(f"sqlite:///{folder}/tandem.db"),
        config=gateway,
        admin=fingerprint(admin),
    )
    sock = socket.create_server(("127.0.0.1", 0))
    http = httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20, limits=httpx.Limits(max_connections=None)
    )
    watched.append(World(http=http, app=app, admission=app.state.admission, queue=app.state.admission.queue(served)))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="critical"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield watched[0]
    finally:
        await http.aclose()
        server.should_exit = True
        await task
        for host in watched[0].hosts:
            await host.drain(0)
