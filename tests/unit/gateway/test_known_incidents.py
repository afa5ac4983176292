"""Incidents of other systems, one test each: what went wrong there does not happen here. Real HTTP on both sides, no Ray.

References are CVE numbers, or the system's issue.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator

import httpx
import pytest
from gateway_world import BODY, World, echo, world
from sqlalchemy import event
from sqlalchemy.engine import Engine
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from tandem.auth import KeyStore
from tandem.auth.key_table import KeyTable
from tandem.engine.echo.engine import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.routing.records import TOKEN_HEADER, adapter_headers
from tandem.serve.replica.host import EngineHost

__all__ = ["world"]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = {"model": "base", "messages": [{"role": "user", "content": "x"}]}


async def closed(world: World) -> str:
    """The secret of the first key of an app, which the app knows."""
    secret = KeyStore.at(world.registry.address).create("laptop", tenant="lab", by="ann").secret
    while (await world.http.get("/v1/models")).status_code != 401:
        await asyncio.sleep(0.05)
    return secret


async def raw(world: World, sent: bytes) -> bytes:
    """All that the gateway's server sends to a client that writes these bytes."""
    reader, writer = await asyncio.open_connection(world.http.base_url.host, world.http.base_url.port)
    writer.write(sent)
    answer = b""
    try:
        async with asyncio.timeout(10):
            while part := await reader.read(65_536):
                answer += part
    except (TimeoutError, ConnectionError):
        pass
    writer.close()
    return answer


async def test_cve_2025_59425_and_2026_23996_a_nearly_right_key_is_refused_like_any_other(world: World) -> None:
    """vLLM compared keys with `==`, so that their time told how much was right; another delayed failures only."""
    secret = await closed(world)
    near = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    answers = [await world.http.get("/v1/models", headers={"x-api-key": key}) for key in (near, "tdm-" + "x" * 43)]
    assert [answer.status_code for answer in answers] == [401, 401] and answers[0].text == answers[1].text
    # Keys are found by their digests: what of a secret is right decides about no step.
    table: KeyTable = world.app.state.identity.keys
    assert secret not in repr(vars(table)) and table.authenticate(secret) and not table.authenticate(near)


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """SQL statements of this process."""
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, parameters: object, *rest: object) -> None:
        seen.append(f"{statement} {parameters}")

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


async def test_cve_2026_42208_no_sql_is_made_of_a_key(world: World, statements: list[str]) -> None:
    """LiteLLM built a query from the key before it was checked."""
    await closed(world)
    statements.clear()
    for mark, key in (("inject", "tdm-inject' OR 1=1 --"), ("drop", "x'; DROP TABLE api_keys; --")):
        answer = await world.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 401 and not [each for each in statements if mark in each.lower()]


async def test_cve_2025_62164_tensors_in_a_request_reach_no_engine(world: World) -> None:
    """vLLM read `prompt_embeds` by torch.load without checks."""
    await world.add_engine(echo())
    part = {"type": "image_embeds", "image_embeds": "AAAA"}
    for path, body in (
        (COMPLETIONS, {"model": "base", "prompt_embeds": "AAAA"}),
        (COMPLETIONS, BODY | {"prompt_embeds": ["AAAA"]}),
        (CHAT, MESSAGES | {"messages": [{"role": "user", "content": [part]}]}),
    ):
        answer = await world.http.post(path, json=body)
        assert answer.status_code == 400 and "gateway.allow" in answer.text, answer.text
    assert world.engines[0].stats().steps == 0


async def test_cve_2025_62426_and_61620_templates_of_clients_reach_no_engine(world: World) -> None:
    """`chat_template_kwargs` and `chat_template` made vLLM compute for minutes, before any limit."""
    await world.add_engine(echo())
    for extra in (
        {"chat_template_kwargs": {"tokenize": True}},
        {"chat_template": "{% for i in range(10**9) %}{% endfor %}"},
    ):
        answer = await world.http.post(CHAT, json=MESSAGES | extra)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(extra))
        # Templates are applied for counting, too.
        assert (await world.http.post("/tokenize", json=MESSAGES | extra)).status_code == 400
    assert world.engines[0].stats().steps == 0


async def test_cve_2025_6242_media_of_inner_hosts_are_not_fetched(world: World) -> None:
    """vLLM fetched any `image_url`, also of hosts that only it reaches."""
    await world.add_engine(echo())
    for url in ("http://169.254.169.254/latest/meta-data", "http://localhost:8265/api", "file:///etc/passwd"):
        part = {"type": "image_url", "image_url": {"url": url}}
        answer = await world.http.post(CHAT, json=MESSAGES | {"messages": [{"role": "user", "content": [part]}]})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "media_not_allowed"
        assert url not in answer.text
    assert world.engines[0].stats().steps == 0


async def test_cve_2025_62727_no_route_answers_parts_of_a_file(world: World) -> None:
    """Starlette merged the ranges of a `Range` header in quadratic time, in FileResponse and StaticFiles."""
    ranges = "bytes=" + ",".join(f"{number}-{number}" for number in range(5_000))
    for path in ("/v1/models", "/health", "/nothing"):
        answer = await world.http.get(path, headers={"Range": ranges})
        assert answer.status_code in (200, 404, 503) and "content-range" not in answer.headers
    mounted = [route.app for route in world.app.routes if isinstance(route, Mount)]
    assert mounted and not [app for app in mounted if isinstance(app, StaticFiles)]


@pytest.mark.parametrize("n", [10**6, 16_384, "1000000", 2**63])
async def test_vllm_n_of_a_million_starts_nothing(world: World, n: object) -> None:
    """One request with `n` = 10^6 took all memory of a vLLM server; its own limit is 16,384."""
    await world.add_engine(echo())
    for path, body in ((COMPLETIONS, BODY), (CHAT, MESSAGES)):
        answer = await world.http.post(path, json=body | {"n": n})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "n", answer.text
    assert world.engines[0].stats().steps == 0


async def test_vllm_api_key_leaves_no_other_route_open(world: World) -> None:
    """vLLM's --api-key protects /v1 alone: /invocations, /pause, /tokenize and others answered everybody."""
    secret = await closed(world)
    paths = (
        *("/invocations", "/pause", "/resume", "/sleep", "/wake_up", "/update_weights", "/collective_rpc", "/metrics"),
        *("/scale_elastic_ep", "/load", "/server_info", "/version", "/ping", "/docs", "/openapi.json", "/redoc"),
        *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/generate", "/reset_prefix_cache"),
    )
    for path in (*paths, "/tokenize", "/detokenize", "/score", "/rerank"):
        for method in ("GET", "POST"):
            assert (await world.http.request(method, path)).status_code == 401, path
    for path in paths:
        answer = await world.http.post(path, json={}, headers={"x-api-key": secret})
        assert answer.status_code in (404, 405), path


async def test_vllm_47724_an_adapter_in_use_gives_its_place_to_no_other() -> None:
    """An adapter that was loaded at run time answered requests in flight for another user's adapter."""
    engine = EchoEngine(delay_s=0.05)
    host = EngineHost(engine, max_adapters=1)
    await host.start()
    red, blue = (AdapterRef(id=f"{name}@1", path=f"/{name}") for name in ("red", "blue"))
    url = f"{host.url}{COMPLETIONS}"
    try:
        async with httpx.AsyncClient(headers={TOKEN_HEADER: host.token}, timeout=20) as http:
            body = {"model": red.id, "prompt": "word " * 30, "stream": True}
            long = asyncio.create_task(http.post(url, json=body, headers=adapter_headers(red)))
            while not engine.stats().running:
                await asyncio.sleep(0.01)
            other = asyncio.create_task(
                http.post(url, json={"model": blue.id, "prompt": "x"}, headers=adapter_headers(blue))
            )
            while not long.done():
                assert "blue@1" not in engine.stats().adapters or not engine.stats().running
                await asyncio.sleep(0.02)
            events = [json.loads(line[6:]) for line in long.result().text.split("\n\n") if line.startswith("data: {")]
            assert len(events) == 30 and {each["model"] for each in events} == {red.id}
            assert (await other).json()["model"] == blue.id and engine.loads == [red.id, blue.id]
    finally:
        await host.drain(0)


SMUGGLED = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
LENGTHS = {
    "two lengths": HEAD + b"content-length: 0\r\ncontent-length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a list of lengths": HEAD + b"content-length: 0, %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a signed length": HEAD + b"content-length: +0\r\n\r\n" + SMUGGLED,
    "length and chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "an unknown coding": HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "chunked is not last": HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a space before the colon": HEAD + b"content-length : %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
    "a line of two": HEAD + b"x: y\r\n content-length: 5\r\ntransfer-encoding\r\n : chunked\r\n\r\n" + SMUGGLED,
}


@pytest.mark.parametrize("sent", LENGTHS.values(), ids=LENGTHS.keys())
async def test_cve_2023_30589_and_2019_18277_a_body_hides_no_second_request(world: World, sent: bytes) -> None:
    """Servers that read the length of one body differently let a client put requests in front of another client's."""
    answer = await raw(world, sent)
    assert answer.count(b"HTTP/1.1 ") <= 1 and b'"object"' not in answer, answer
    assert not answer or answer.split()[1] in (b"400", b"411", b"415", b"501"), answer


async def test_compressed_bodies_are_not_unpacked(world: World) -> None:
    """Gateways that unpack bodies are stopped by some kB that mean GB."""
    packed = gzip.compress(b'{"model": "base", "prompt": "' + b"a" * 2**24 + b'"}')
    for coding in ("gzip", "deflate", "br", "zstd", "gzip, gzip"):
        answer = await world.http.post(COMPLETIONS, content=packed[:4000], headers={"content-encoding": coding})
        assert answer.status_code == 415 and answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("depth", [150, 199, 2_000, 4_000])
async def test_deep_json_is_an_error_of_the_client(world: World, depth: int) -> None:
    """Parsers and checks that recurse end their process, or answer 500."""
    await world.add_engine(echo())
    nested = b"[" * (depth // 2) + b"]" * (depth // 2)
    for field in (b"prompt", b"messages", b"metadata", b"response_format", b"stop", b"unknown"):
        answer = await world.http.post(COMPLETIONS, content=b'{"model":"base","%s":%s}' % (field, nested))
        assert answer.status_code < 500, (field, answer.text)


async def test_cve_2025_48956_large_heads_stop_no_other_request(world: World) -> None:
    """vLLM took headers of any size; here HAProxy refuses heads above 63 KiB (tests/unit/cluster), and a gateway lives on."""
    await world.add_engine(echo())
    answer = await raw(world, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 2**20 + b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert (await world.http.post(COMPLETIONS, json=BODY)).status_code == 200
