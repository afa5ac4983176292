"""A tunnel on a machine that reaches the app itself: real sockets, no ssh."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from tandem.cluster import tunnel as tunnel_module
from tandem.cluster.tunnel import AppEndedError, Reminders, Target, Tunnel, in_background
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
        port = await tunnel.start(0)
        await asyncio.wait_for(tunnel.wait(), 5)
        assert messages == ["ssh is away"]
        # No request, and no key, reaches the address of an app that has ended.
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        await tunnel.stop()


class AwaySsh:
    """A connection that is lost, and whose host refuses `refusals` attempts to make it again."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.is_up = refusals, False

    def is_open(self) -> bool:
        return self.is_up

    def open_again(self, on_line: Callable[[str], None]) -> None:
        if self.refusals:
            self.refusals -= 1
            on_line("No route to host")
            raise ClusterError("`ssh gate` failed")
        self.is_up = True

    def forward(self, host: str, port: int) -> int:
        return port


async def test_a_host_that_stays_away_is_told_once_and_the_return_too() -> None:
    messages: list[str] = []
    async with app("first") as target:
        ssh = AwaySsh(refusals=0)
        tunnel = Tunnel(ssh, target, lambda: None, messages.append)  # type: ignore[arg-type]
        await tunnel.start(0)
        ssh.is_up, ssh.refusals = False, 5
        async with asyncio.timeout(5):
            while "Connected again." not in messages:
                await asyncio.sleep(0.01)
        ssh.is_up, ssh.refusals = False, 0
        async with asyncio.timeout(5):
            while messages.count("Connected again.") < 2:
                await asyncio.sleep(0.01)
        await tunnel.stop()
    lost = "The SSH connection is lost; connecting again."
    first = [lost, "No route to host", "`ssh gate` failed", "Connected again."]
    assert messages == [*first, lost, "Connected again."]


def test_a_message_comes_again_at_growing_intervals_or_when_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tunnel_module.time, "monotonic", lambda: now[0])
    told: list[tuple[float, str]] = []
    remind = Reminders(lambda message: told.append((now[0], message)))
    for second in range(100):
        now[0] = float(second)
        remind("away")
        if second == 10:
            remind("refused")
    assert told == [(0, "away"), (10, "refused"), (30, "away"), (90, "away")]


def test_a_tunnel_in_the_background_serves_code_without_a_loop() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = Target("app", "127.0.0.1", server.getsockname()[1])
        with in_background(Tunnel(None, target, lambda: None)) as port:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(b"hello")
                accepted, _ = server.accept()
                with accepted:
                    assert accepted.recv(5) == b"hello"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


async def test_a_taken_port_is_refused() -> None:
    async with app("first") as target:
        tunnel = Tunnel(None, target, lambda: None)
        with pytest.raises(ClusterError, match="Choose another one"):
            await tunnel.start(target.port)
        await tunnel.stop()
