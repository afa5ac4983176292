"""A gateway in front of echo engines: real HTTP on both sides, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from small_folders import small_adapter, small_model
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.config import GatewayConfig, ServedModelConfig
from tandem.engine.echo.engine import EchoEngine
from tandem.gateway.app import create_app
from tandem.ids import fingerprint
from tandem.jobs.tracking.logs import LogSource
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.serve.replica.adapter_checks import AdapterChecker
from tandem.serve.replica.host import EngineHost
from tandem.usage import UsageCounts, UsageLabels

BODY = {"model": "base", "prompt": "one two three"}


class Reflecting(EchoEngine):
    """Has every route and task; routes other than the echo engine's answer with the request's own body."""

    def __init__(
        self, names: tuple[str, ...], *, tasks: tuple[str, ...] = ("generate", "embed", "score"), **options: Any
    ) -> None:
        super().__init__(names, tasks=tasks, **options)

    def _routes(self) -> list[BaseRoute]:
        responses = Route("/v1/responses", self._reflect, methods=["POST"])
        return [responses, *super()._routes(), Route("/{path:path}", self._reflect, methods=["POST"])]

    async def _reflect(self, request: Request) -> Response:
        body = await request.json()
        if not self._knows(str(body.get("model"))):
            return JSONResponse({"error": {"message": "no such model"}}, status_code=404)
        return JSONResponse({"object": "echo", "route": request.url.path, "request": body})


@dataclass
class World:
    http: httpx.AsyncClient
    registry: Registry
    folder: Path
    app: Starlette = field(default_factory=Starlette)
    engines: list[EchoEngine] = field(default_factory=list)
    hosts: list[EngineHost] = field(default_factory=list)
    records: dict[str, ReplicaRecord] = field(default_factory=dict)
    usage: list[tuple[UsageLabels, UsageCounts]] = field(default_factory=list)
    """Of requests that have ended, as their replicas counted them."""
    version: int = 1

    async def watch(self, version: int) -> Snapshot:
        if version == self.version:
            await asyncio.sleep(0.01)
        held = {host.url: (host.stats().adapters, host.in_slots) for host in self.hosts}
        now = []
        for record in self.records.values():
            adapters, slots = held.get(record.url, ((), ()))
            now.append(replace(record, adapters=adapters, slots=slots))
        return Snapshot(version=self.version, replicas=tuple(now))

    async def add_engine(self, engine: EchoEngine, checks: bool = False) -> None:
        prepare = {"prepare": AdapterChecker(self.folder / "model", 16)} if checks else {}
        host = EngineHost(
            engine,
            max_adapters=2,
            record_usage=lambda labels, counts: self.usage.append((labels, counts)),
            **prepare,  # type: ignore[arg-type]
        )
        await host.start()
        name = f"r{len(self.hosts)}"
        self.engines.append(engine)
        self.hosts.append(host)
        self.records[name] = ReplicaRecord(id=name, pool="base@1", url=host.url, token=host.token)
        self.version += 1
        async with asyncio.timeout(20):
            while all(replica.id != name for replica in self.app.state.fleet.replicas):
                await asyncio.sleep(0.01)

    def adapter(self, name: str, rank: int = 8, promote: bool = True, **values: bool) -> None:
        path = small_adapter(self.folder / f"{name}-{rank}", f"{name}-{rank}", rank=rank, **values)
        self.registry.register_adapter(name, path, base="base", promote=promote)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path) as result:
        yield result


@contextlib.asynccontextmanager
async def running(
    tmp_path: Path,
    *,
    proxy_secret: str | None = None,
    run_logs: Callable[[], LogSource] | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """A world whose gateway has these settings beside the usual ones, behind the HAProxy with a secret."""
    registry = Registry(f"sqlite:///{tmp_path}/tandem.db")
    registry.register_model("base", small_model(tmp_path / "model", config={"max_position_embeddings": 64}))
    served = ServedModel(
        id="base@1",
        name="base",
        path="",
        max_length=64,
        config=ServedModelConfig(model="base", engine="vllm", max_lora_rank=16, hold_s=0.0),
    )
    result = World(http=httpx.AsyncClient(), registry=registry, folder=tmp_path)
    config = GatewayConfig(
        max_body_bytes=4096,
        upload_timeout_s=2.0,
        connect_timeout_s=1.0,
        retry_after_s=7,
        **{"adapter_sources": ("/",), **settings},
    )
    app = create_app(
        models=[served],
        watch=result.watch,
        registry=registry,
        config=config,
        admin=fingerprint("secret"),
        access_log=tmp_path / "logs" / "access.jsonl",
        proxy_secret=proxy_secret,
        run_logs=run_logs,
    )
    result.app = app
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error", proxy_headers=False))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    # Also for tests that write their bodies themselves.
    result.http = httpx.AsyncClient(base_url=url, timeout=20, headers={"content-type": "application/json"})
    while not server.started:
        await asyncio.sleep(0.01)
    yield result
    await result.http.aclose()
    server.should_exit = True
    await task
    for host in result.hosts:
        await host.drain(0)


def echo(**options: float) -> EchoEngine:
    return EchoEngine(("base@1", "base"), **options)  # type: ignore[arg-type]
