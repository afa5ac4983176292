"""The HTTP client for engines, against servers that answer in every way, right and wrong."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tandem.gateway.replicas import engine_http, engine_pool
from tandem.gateway.replicas.engine_http import (
    ConnectionLostError,
    EngineAnswer,
    InvalidAnswerError,
    NotConnectedError,
    SilentEngineError,
)
from tandem.gateway.replicas.engine_pool import EngineConnections

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: Text/Plain; x=1\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A server on a free port that answers each request by `answer`."""

    def __init__(self, answer: Answer) -> None:
        self.url = ""
        self.connections = 0
        self.requests: list[bytes] = []
        self.left = asyncio.Event()
        """Set once a client has ended a connection."""
        self._answer = answer

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self._answer(reader, writer)
        self.left.set()
        writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Answer | bytes) -> AsyncIterator[tuple[Server, EngineConnections]]:
    """A server, and a client for it."""

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert isinstance(answer, bytes)
        writer.write(answer)

    server = Server(send if isinstance(answer, bytes) else answer)
    listening = await asyncio.start_server(server.handle, "127.0.0.1", 0, limit=1 << 22)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    connections = EngineConnections(connect_timeout_s=2.0)
    try:
        yield server, connections
    finally:
        connections.close()
        listening.close()


async def ask(
    connections: EngineConnections, server: Server, body: bytes = b"", silent_s: float = 5.0, **headers: str
) -> EngineAnswer:
    """An answer whose head has been read."""
    answer = await connections.request("POST", f"{server.url}/v1/x", headers, body, silent_s=silent_s)
    try:
        await answer.wait_for_head()
    except BaseException:
        answer.close()
        raise
    return answer


async def say_hello_twice(connections: EngineConnections, server: Server) -> None:
    """Two requests, one after the other, with time in between for what the server does after an answer."""
    for _ in range(2):
        answer = await ask(connections, server)
        assert await answer.read() == b"hello"
        answer.close()
        await asyncio.sleep(0.05)


async def test_answers_come_over_one_connection_while_they_are_read_to_their_ends() -> None:
    async with serving(WHOLE) as (server, connections):
        for _ in range(3):
            answer = await ask(connections, server, **{"x-name": "grün"})
            assert (answer.status, answer.content_type, answer.content_length) == (200, "text/plain", 5)
            assert await answer.read() == b"hello"
            answer.close()
    assert server.connections == 1
    assert server.requests[0].startswith(b"POST /v1/x HTTP/1.1\r\nhost: 127.0.0.1:")
    assert "x-name: grün\r\n".encode() in server.requests[0]


async def test_a_request_is_written_without_waiting_for_other_tasks() -> None:
    async with serving(WHOLE) as (server, connections):
        answer = await ask(connections, server)
        await answer.read()
        answer.close()
        request = connections.request("POST", server.url, {}, b"body", silent_s=5.0)
        with pytest.raises(StopIteration) as written:
            request.send(None)
        second = written.value.value
        assert await second.read() == b"hello"
        second.close()


async def test_an_answer_that_is_left_ends_its_connection() -> None:
    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await reader.read()

    async with serving(stream) as (server, connections):
        answer = await ask(connections, server)
        assert await answer.read_any() == b"one"
        answer.close()
        await asyncio.wait_for(server.left.wait(), 5)
        (await ask(connections, server)).close()
    assert server.connections == 2


async def test_nobody_listens() -> None:
    async with serving(WHOLE) as (server, connections):
        server.url = "http://127.0.0.1:1"
        with pytest.raises(NotConnectedError):
            await ask(connections, server)


async def test_what_has_arrived_is_read_before_the_error_of_a_lost_connection() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await writer.drain()
        writer.close()

    async with serving(half) as (server, connections):
        answer = await ask(connections, server)
        await asyncio.sleep(0.05)
        assert await answer.read_any() == b"one"
        with pytest.raises(ConnectionLostError):
            await answer.read_any()
        answer.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * (engine_http.MAX_HEAD_BYTES + 1) + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    ],
    ids=["another protocol", "a long head", "two lengths"],
)
async def test_what_is_no_http_is_told_apart_from_a_lost_connection(answer: bytes) -> None:
    async with serving(answer) as (server, connections):
        with pytest.raises(InvalidAnswerError):
            await ask(connections, server)


async def test_broken_chunks_are_no_http() -> None:
    async with serving(CHUNKED + b"3\r\none\r\nzz\r\n") as (server, connections):
        answer = await ask(connections, server)
        with pytest.raises(InvalidAnswerError):
            while await answer.read_any():
                pass
        answer.close()


async def test_a_silent_engine_is_told_apart_too() -> None:
    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(nothing) as (server, connections):
        with pytest.raises(SilentEngineError):
            await ask(connections, server, silent_s=0.1)
        await asyncio.wait_for(server.left.wait(), 5)


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async def until_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nsome text")
        await writer.drain()
        writer.close()

    async with serving(until_close) as (server, connections):
        answer = await ask(connections, server)
        assert await answer.read() == b"some text"
        answer.close()
        assert (await ask(connections, server)).status == 200
    assert server.connections == 2


async def test_informational_answers_come_before_the_answer() -> None:
    async with serving(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + WHOLE) as (server, connections):
        for _ in range(2):
            answer = await ask(connections, server)
            assert (answer.status, "link" in answer.headers, await answer.read()) == (200, False, b"hello")
            answer.close()
    assert server.connections == 1


async def test_trailers_are_not_headers() -> None:
    async with serving(CHUNKED + b"3\r\none\r\n0\r\nx-late: 1\r\n\r\n") as (server, connections):
        answer = await ask(connections, server)
        assert await answer.read() == b"one"
        assert "x-late" not in answer.headers
        answer.close()


async def test_an_engine_waits_for_a_slow_reader() -> None:
    taken = 0

    async def much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20))
        for _ in range(64):
            writer.write(bytes(1 << 20))
            await writer.drain()
            taken += 1

    async with serving(much) as (server, connections):
        answer = await ask(connections, server, silent_s=0.2)
        await asyncio.sleep(0.5)
        assert taken < 32
        assert sum([len(part) async for part in parts(answer)]) == 64 << 20
        answer.close()
    assert server.connections == 1


async def parts(answer: EngineAnswer) -> AsyncIterator[bytes]:
    """The parts of a body as they are read."""
    while part := await answer.read_any():
        yield part


async def test_an_engine_may_answer_before_it_has_read_the_body() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await asyncio.sleep(10)

    async with serving(refuse) as (server, connections):
        answer = await asyncio.wait_for(ask(connections, server, body=bytes(64 << 20)), 5)
        assert (answer.status, await answer.read()) == (413, b"no")
        answer.close()


async def test_a_line_break_never_reaches_a_head() -> None:
    async with serving(WHOLE) as (server, connections):
        with pytest.raises(ValueError, match="line break"):
            await ask(connections, server, **{"x-a": "1\r\nx-b: 2"})
    assert not server.requests


async def test_an_answer_that_nobody_asked_for_ends_its_connection() -> None:
    async with serving(WHOLE + WHOLE) as (server, connections):
        await say_hello_twice(connections, server)
    assert server.connections == 2


async def test_all_connections_of_a_replica_are_broken_at_once() -> None:
    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with serving(nothing) as (server, connections):
        waiting = [asyncio.create_task(ask(connections, server)) for _ in range(3)]
        while server.connections < 3:
            await asyncio.sleep(0.01)
        assert connections.abort(server.url) == 3
        for each in waiting:
            with pytest.raises(ConnectionLostError):
                await each
        assert connections.abort(server.url) == 0


async def test_a_connection_that_its_engine_has_closed_is_not_used_again() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)
        await writer.drain()
        writer.close()

    async with serving(once) as (server, connections):
        await say_hello_twice(connections, server)
    assert server.connections == 2


async def test_idle_connections_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_pool, "KEEP_ALIVE_S", 0.1)
    async with serving(WHOLE) as (server, connections):
        answer = await ask(connections, server)
        await answer.read()
        answer.close()
        await asyncio.wait_for(server.left.wait(), 5)
        assert connections.abort(server.url) == 0
