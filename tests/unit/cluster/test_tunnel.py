"""A tunnel on a machine that reaches the app itself: real sockets, no ssh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tandem.cluster import tunnel as tunnel_module
from tandem.cluster.tunnel import AppEndedError, Target, Tunnel
from tandem.errors import ClusterError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunnel_module, "RETRY_S", 0.02)


@asynccontextmanager
async def app(name: str) -> AsyncIterator[Target]:
    """A server that answers each line with its name and the line, and says at the end of a connection that it has ended."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(f"{name} {line.decode()}".encode())
            await writer.drain()
        writer.write(b"end\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield Target(name, "127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, text: str) -> str:
    writer.write(f"{text}\n".encode())
    return (await asyncio.wait_for(reader.readline(), 5)).decode().strip()


async def test_bytes_and_the_end_of_one_direction_pass_both_ways() -> None:
    async with app("first") as target:
        tunnel = Tunnel(None, target, lambda: None)
        port = await tunnel.start(0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await ask(reader, writer, "hello") == "first hello"
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 5) == b"end\n"
        writer.close()
        await tunnel.stop()


async def test_new_connections_go_to_the_successor_while_old_ones_stay() -> None:
    async with app("first") as first, app("second") as second:
        now = [first]
        messages: list[str] = []
        tunnel = Tunnel(None, first, lambda: now[0], messages.append)
        port = await tunnel.start(0)
        old = await asyncio.open_connection("127.0.0.1", port)
        assert await ask(*old, "a") == "first a"
        now[0] = second
        async with asyncio.timeout(5):
            while not messages:
                await asyncio.sleep(0.01)
        new = await asyncio.open_connection("127.0.0.1", port)
        assert await ask(*new, "b") == "second b" and await ask(*old, "c") == "first c"
        for _, writer in (old, new):
            writer.close()
        await tunnel.stop()


async def test_it_ends_when_the_app_has_and_outlives_a_look_that_fails() -> None:
    errors = [ClusterError("ssh is away"), AppEndedError("over")]
    messages: list[str] = []

    def find_target() -> Target | None:
        raise errors.pop(0)

    async with app("first") as target:
        tunnel = Tunnel(None, target, find_target, messages.append)
        await tunnel.start(0)
        await asyncio.wait_for(tunnel.wait(), 5)
        assert messages == ["ssh is away"]
        await tunnel.stop()


async def test_a_taken_port_is_refused() -> None:
    async with app("first") as target:
        tunnel = Tunnel(None, target, lambda: None)
        with pytest.raises(ClusterError, match="Choose another one"):
            await tunnel.start(target.port)
        await tunnel.stop()
