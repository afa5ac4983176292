"""Routing by a real gateway: real HTTP on both sides, echo engines, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tandem.config import RouterConfig, ServedModelConfig
from tandem.engine.echo.engine import EchoEngine
from tandem.gateway.app import create_app
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.serve.replica.host import EngineHost

REPLICAS = 6
LONG = "one two three four five " * 60
"""1,440 bytes."""


class Counting(EchoEngine):
    """An echo that knows what it was asked."""

    def __init__(self) -> None:
        super().__init__(("base",), max_length=10_000)
        self.prompts: list[str] = []

    async def _answer(self, request: Any, body: dict[str, Any], prompt: str, *, chat: bool) -> Any:
        self.prompts.append(prompt)
        return await super()._answer(request, body, prompt, chat=chat)


@contextlib.asynccontextmanager
async def gateway(folder: Path, router: RouterConfig | None) -> AsyncIterator[tuple[httpx.AsyncClient, list[Counting]]]:
    """A gateway before six engines."""
    engines = [Counting() for _ in range(REPLICAS)]
    hosts = [EngineHost(engine, max_adapters=0) for engine in engines]
    for host in hosts:
        await host.start()
    records = tuple(ReplicaRecord(id=h.url, pool="base", url=h.url, token=h.token) for h in hosts)

    async def watch(version: int) -> Snapshot:
        await asyncio.sleep(0.05 if version else 0)
        return Snapshot(version=1, replicas=tuple(replace(r) for r in records))

    app = create_app(
        models=[ServedModel(id="base", name="base", path="", config=ServedModelConfig(model="base", engine="vllm"))],
        watch=watch,
        registry=Registry(f"sqlite:///{folder}/tandem.db"),
        router=router,
    )
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="error"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", timeout=20) as http:
        yield http, engines
    server.should_exit = True
    await task
    for host in hosts:
        await host.drain(0)


async def ask(http: httpx.AsyncClient, prompt: str, headers: dict[str, str] | None = None, **body: Any) -> None:
    answer = await http.post("/v1/completions", json={"model": "base", "prompt": prompt, **body}, headers=headers)
    assert answer.status_code == 200, answer.text


async def test_the_configured_policy_chooses(tmp_path: Path) -> None:
    async with gateway(tmp_path, RouterConfig(policy="round_robin")) as (http, engines):
        for _ in range(2 * REPLICAS):
            await ask(http, LONG, user="ann")
        assert [len(engine.prompts) for engine in engines] == [2] * REPLICAS


async def test_by_default_texts_with_a_common_prefix_go_to_one_replica(tmp_path: Path) -> None:
    async with gateway(tmp_path, None) as (http, engines):
        for i in range(5):
            for text in "abcdefgh":
                await ask(http, f"{text} {LONG} {i}")
        for text in "abcdefgh":
            assert sum(any(prompt.startswith(text) for prompt in engine.prompts) for engine in engines) == 1
        assert sum(bool(engine.prompts) for engine in engines) > 1


async def test_a_session_named_in_a_header_or_in_the_body_stays_at_one_replica(tmp_path: Path) -> None:
    async with gateway(tmp_path, None) as (http, engines):
        for i in range(5):
            await ask(http, f"header {i}", {"x-session-id": "s1"})
            await ask(http, f"field {i}", prompt_cache_key="s2")
        for word in ("header", "field"):
            assert sum(any(prompt.startswith(word) for prompt in engine.prompts) for engine in engines) == 1
