"""Answers of an engine that are no HTTP, or have long headers: not the loss of a replica."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from overload_world import ROUTE, Listening, World, overload_world

from tandem.routing.records import ReplicaRecord

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@contextlib.asynccontextmanager
async def raw_engine(world: World, answer: bytes, name: str = "raw") -> AsyncIterator[list[bytes]]:
    """A replica that answers every request with these bytes and closes; the requests that it got."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            asked.append(await reader.read(65_536))
            writer.write(answer)
            await writer.drain()
            await asyncio.sleep(0.1)

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        world.records[name] = ReplicaRecord(id=name, pool="base", url=url, token="t")
        world.version += 1
        await asyncio.sleep(0.1)
        yield asked
        del world.records[name]
        world.version += 1


@pytest.mark.parametrize("size", [9_000, 60_000])
async def test_a_header_that_describes_many_embeddings_reaches_the_client(tmp_path: Path, size: int) -> None:
    async with overload_world(tmp_path) as world:
        answer = HEAD + b"metadata: " + b"m" * size + b"\r\ncontent-length: 2\r\n\r\n{}"
        async with raw_engine(world, answer) as asked:
            found = await world.http.post("/v1/embeddings", json={"model": "base", "input": ["a"] * 74})
            assert found.status_code == 200 and len(found.headers["metadata"]) == size and len(asked) == 1


BROKEN = {
    "no status line": b"this is no HTTP\r\n\r\n",
    "a header that is too long": HEAD + b"metadata: " + b"m" * (1 << 21) + b"\r\ncontent-length: 2\r\n\r\n{}",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN.keys())
async def test_an_answer_that_is_no_http_is_502_and_ejects_no_replica(tmp_path: Path, answer: bytes) -> None:
    async with overload_world(tmp_path, hold_s=0.0) as world:
        async with raw_engine(world, answer) as first, raw_engine(world, answer, "second") as second:
            for asked in range(1, 7):
                failed = await world.http.post(ROUTE, json={"model": "base", "prompt": "x"})
                assert failed.status_code == 502, failed.text
                assert failed.json()["error"]["code"] == "engine_protocol_error"
                assert failed.headers["x-should-retry"] == "false"
                # Not sent a second time.
                assert len(first) + len(second) == asked
            # The router keeps one prompt at one replica, as long as that is no suspect.
            assert sorted((len(first), len(second))) == [0, 6]
        # Nothing is held against the body, either.
        await world.add(Listening())
        assert (await world.http.post(ROUTE, json={"model": "base", "prompt": "x"})).status_code == 200


CUT = {
    "in the head": HEAD,
    "before the body": HEAD + b"content-length: 2\r\n\r\n",
    "before the first chunk": HEAD + b"transfer-encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("answer", CUT.values(), ids=CUT.keys())
async def test_a_connection_that_is_lost_before_the_first_byte_is_a_lost_replica(tmp_path: Path, answer: bytes) -> None:
    async with overload_world(tmp_path, hold_s=10.0) as world, raw_engine(world, answer) as asked:
        asking = world.ask("x")
        await world.until(lambda: len(asked) == 1)
        await world.add(Listening())
        assert (await asking).status_code == 200 and len(asked) == 1
