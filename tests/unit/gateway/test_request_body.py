"""Bodies that are too large, too slow, of another type or of too many values are refused; streams beside them go on."""

from __future__ import annotations

import asyncio
import time

import pytest
from gateway_world import BODY, World, echo, world

__all__ = ["world"]


async def send(world: World, head: str, body: bytes, *, pause_s: float = 0.0) -> bytes:
    """The first line of the answer to a request that is written byte for byte."""
    url = world.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{head}\r\n\r\n".encode() + body)
    await asyncio.sleep(pause_s)
    async with asyncio.timeout(20):
        line = await reader.readline()
    writer.close()
    return line


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_a_body_of_another_type_than_json_is_refused(world: World, kind: str) -> None:
    await world.add_engine(echo())
    headers = {"content-type": kind}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        answer = await world.http.post(path, content=b'{"model": "base", "prompt": "a"}', headers=headers)
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_content_type"


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/vnd.x+json"])
async def test_json_by_any_of_its_types_is_taken(world: World, kind: str) -> None:
    await world.add_engine(echo())
    body = b'{"model": "base", "prompt": "a"}'
    answer = await world.http.post("/v1/completions", content=body, headers={"content-type": kind})
    assert answer.status_code == 200


async def test_a_body_without_a_type_is_refused(world: World) -> None:
    assert b" 415 " in await send(world, "content-length: 2", b"{}")


async def test_a_body_that_does_not_come_gets_408(world: World) -> None:
    head = "content-type: application/json\r\ncontent-length: 100"
    began = time.monotonic()
    assert b" 408 " in await send(world, head, b'{"model"')
    assert time.monotonic() - began < 15


async def test_a_body_of_too_many_values_is_413_and_blocks_nobody(world: World) -> None:
    body = b'{"a":[' + b"{}," * 1300 + b"{}]}"  # all that fits into the limit of this gateway
    assert len(body) < 4096
    answer = await world.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400  # as many are fine, but there is no model
    answer = await world.http.post("/v1/completions", json={**BODY, "x": "y" * 5000})
    assert answer.status_code == 413 and "gateway.max_body_bytes" in answer.json()["error"]["message"]
