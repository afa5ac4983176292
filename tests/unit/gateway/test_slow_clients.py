"""Clients that do not read their answers: they are disconnected and cost no memory meanwhile."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from overload_world import ROUTE, Listening, World, overload_world
from pydantic_core import to_json
from starlette.types import Message

from tandem.config import GatewayConfig
from tandem.engine.echo.engine import EchoEngine
from tandem.serve.replica.host import EngineHost


async def test_a_client_that_reads_nothing_is_disconnected(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(client_stall_s=0.4), requests_per_replica=1) as world:
        engine = Listening()
        await world.add(engine)
        with socket.create_connection((world.http.base_url.host, world.http.base_url.port or 0)) as client:
            client.sendall(large_request())
            await world.until(lambda: engine.stats().running == 1)
            await world.until(lambda: engine.aborted == 1)
            # Its place is free although it is still connected.
            assert (await world.ask("next")).status_code == 200


class Fickle(EchoEngine):
    """Takes three words; a stream of `break off` ends after the first."""

    def __init__(self) -> None:
        super().__init__(("base",), max_length=3)

    async def _stream(self, head: Any, tokens: list[str], usage: Any, *, chat: bool) -> AsyncIterator[bytes]:
        async for event in super()._stream(head, tokens, usage, chat=chat):
            yield event
            if tokens == ["break", " off"]:
                await asyncio.sleep(0.05)
                raise RuntimeError("The engine fails in the middle, as its test asks it to.")


def is_head(message: Message) -> bool:
    return message["type"] == "http.response.start"


def is_end(message: Message) -> bool:
    return not is_head(message) and not message.get("more_body")


def is_error_event(message: Message) -> bool:
    return b"engine_unavailable" in message.get("body", b"")


UNTAKEN: list[tuple[str, bool, Callable[[Message], bool]]] = [
    ("one two", True, is_head),
    ("one two", True, is_end),
    ("one two", False, is_end),
    ("too many words now", False, is_head),
    ("too many words now", False, is_end),
    ("break off", True, is_error_event),
    ("break off", True, is_end),
]


async def test_a_client_that_does_not_read_head_or_end_is_disconnected(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(client_stall_s=0.2), requests_per_replica=1) as world:
        await world.add(Fickle())
        for prompt, stream, untaken in UNTAKEN:
            with pytest.raises(ConnectionAbortedError):
                await asyncio.wait_for(asked_but(world, untaken, prompt=prompt, stream=stream), 5)
            assert world.queue.running == 0, (prompt, stream, untaken)


HEADERS = [(b"content-type", b"application/json")]


async def asked_but(world: World, untaken: Callable[[Message], bool], **body: Any) -> None:
    """A request of a client that takes all of its answer but this."""
    asked = [{"type": "http.request", "body": to_json({"model": "base", **body})}]

    async def receive() -> Message:
        return asked.pop() if asked else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Message) -> None:
        if untaken(message):
            await asyncio.Event().wait()

    await world.app(
        {"type": "http", "method": "POST", "path": ROUTE, "query_string": b"", "headers": HEADERS}, receive, send
    )


GATEWAY = """
import asyncio, contextlib, socket, sys
import uvicorn
from tandem.config import ServedModelConfig
from tandem.gateway.app import create_app
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot

url, token, folder = sys.argv[1:]

async def watch(version):
    await asyncio.sleep(0.5 if version else 0)
    return Snapshot(version=1, replicas=(ReplicaRecord(id="r", pool="base", url=url, token=token),))

served = ServedModel(id="base", name="base", path="", config=ServedModelConfig(model="base", engine="vllm"))
app = create_app(models=[served], watch=watch, registry=Registry(f"sqlite:///{folder}/tandem.db"))
sock = socket.create_server(("127.0.0.1", 0))
print(sock.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="critical")).run(sockets=[sock])
"""
READERS, ANSWER_MB, GROWTH_MB = 16, 48, 32


async def test_slow_clients_increase_neither_gateway_memory_nor_engine_progress(tmp_path: Path) -> None:
    engine = EchoEngine(("base",))
    host = EngineHost(engine, max_adapters=0)
    await host.start()
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, host.url, host.token, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert gateway.stdout is not None
    port = int(await gateway.stdout.readline())
    clients = []
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
            for _ in range(5):
                assert (await http.post(ROUTE, json={"model": "base", "prompt": "x " * 50})).status_code == 200
            memory = psutil.Process(gateway.pid).memory_info
            before = memory().rss
            for _ in range(READERS):
                client = socket.create_connection(("127.0.0.1", port))
                clients.append(client)
                client.sendall(large_request())
            # Until all buffers on the way are full.
            deadline, last = time.monotonic() + 30, 0
            while time.monotonic() < deadline and (engine.stats().running < READERS or memory().rss - last > 2**20):
                last = memory().rss
                await asyncio.sleep(0.5)
            assert engine.stats().running == READERS, "the engine wrote all of it"
            assert memory().rss - before < GROWTH_MB * 2**20
            assert (await http.post(ROUTE, json={"model": "base", "prompt": "x"})).status_code == 200
    finally:
        for client in clients:
            client.close()
        gateway.terminate()
        await gateway.wait()
        await host.drain(0)


def large_request() -> bytes:
    """A request for a stream of `ANSWER_MB`, in events of 4 KiB."""
    body = b'{"model": "base", "prompt": "%s", "stream": true, "ignore_eos": true, "max_tokens": %d}' % (
        b"x" * 4096,
        ANSWER_MB * 256,
    )
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        ROUTE.encode(),
        len(body),
        body,
    )
