"""Every route of the gateway in front of echo engines, with errors as the SDK of each API reads them. Real HTTP, no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import uvicorn
from gateway_world import Reflecting
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from tandem.config import GatewayConfig, ServedModelConfig, StoredConfig
from tandem.engine.echo.engine import EchoEngine
from tandem.engine.routes import ALLOWED, ENGINE_ROUTES
from tandem.gateway import latency
from tandem.gateway.app import create_app
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.serve.replica.host import EngineHost

CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}

MESSAGES = [{"role": "user", "content": "a"}]
FULL: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/v1/embeddings": {"input": "a"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/score": {"queries": "a", "documents": ["b"]},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
"""The required fields of each route."""


class Scripted(EchoEngine):
    """Answers every POST alike: with a status and a body, or with the pieces of a stream that then breaks off."""

    def __init__(self, *pieces: bytes, status: int = 200, body: Any = None, breaks: bool = False) -> None:
        super().__init__(("base",))
        self._pieces, self._status, self._body, self._breaks = pieces, status, body, breaks
        self._scripted = Starlette(routes=[Route("/{path:path}", self._answer_all, methods=["POST"])])

    @property
    def app(self) -> ASGIApp:
        return self._scripted

    async def _answer_all(self, request: Request) -> Response:
        await request.body()
        if not self._pieces:
            return JSONResponse(self._body, status_code=self._status)
        return StreamingResponse(self._stream_all(), media_type="text/event-stream")

    async def _stream_all(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
            await asyncio.sleep(0.02)
        if self._breaks:
            raise RuntimeError("The engine fails in the middle, as its test asks it to.")


@dataclass(kw_only=True)
class Gate:
    """A gateway that runs, and what it told of the time it took."""

    url: str
    http: httpx.AsyncClient
    added: list[tuple[str, float]]

    def openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0)

    def anthropic(self) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url, api_key="x", max_retries=0)


@contextlib.asynccontextmanager
async def gateway(
    folder: Path,
    engine: EchoEngine | None = None,
    prefix: str = "",
    max_adapters: int = 8,
    strict: bool = False,
    tools: bool = True,
    server_adds_request_id: bool = False,
    stored: StoredConfig | None = None,
) -> AsyncIterator[Gate]:
    """A gateway before one engine, or before none, that serves the model `base`."""
    host = EngineHost(engine, max_adapters=0) if engine else None
    replicas: tuple[ReplicaRecord, ...] = ()
    if host:
        await host.start()
        replicas = (ReplicaRecord(id="r0", pool="base", url=host.url, token=host.token, tasks=host.stats().tasks),)

    async def watch(version: int) -> Snapshot:
        await asyncio.sleep(0.01)
        return Snapshot(version=1, replicas=replicas)

    added: list[tuple[str, float]] = []
    app: ASGIApp = create_app(
        models=[
            ServedModel(
                id="base",
                name="base",
                path="",
                config=ServedModelConfig(model="base", engine="vllm", max_adapters=max_adapters, hold_s=0.0),
                supports_tools=tools,
            )
        ],
        watch=watch,
        registry=Registry(f"sqlite:///{folder}/tandem.db"),
        config=GatewayConfig(max_body_bytes=4096, retry_after_s=7, strict=strict, stored=stored or StoredConfig()),
        record_latency=lambda route, ms: added.append((route, ms)),
        server_adds_request_id=server_adds_request_id,
    )
    if prefix:
        inner = app
        app = Starlette(routes=[Mount(prefix, inner)], lifespan=inner.router.lifespan_context)  # type: ignore[attr-defined]
    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="critical"))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}{prefix}"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=20, headers={"content-type": "application/json"}) as http:
            yield Gate(url=url, http=http, added=added)
    finally:
        server.should_exit = True
        await task
        if host:
            await host.drain(0)


@pytest.mark.parametrize("prefix", ["", "/below"])
async def test_each_route_reaches_the_engine_unchanged(tmp_path: Path, prefix: str) -> None:
    async with gateway(tmp_path, Reflecting(("base",)), prefix) as gate:
        for route in ENGINE_ROUTES:
            body = {"model": "base", **FULL[route.path], "extra": {"kept": [1, "ü"]}}
            answer = await gate.http.post(route.path, json=body)
            assert answer.status_code == 200, (route.path, answer.text)
            if answer.json()["object"] == "echo":
                assert answer.json()["route"] == route.path
                assert answer.json()["request"].items() >= body.items()
            assert (await gate.http.post(route.path, json=body | {"model": "nobody"})).status_code == 404
            # Stored chat completions are listed.
            is_listed = route.path == "/v1/chat/completions"
            assert (await gate.http.get(route.path)).status_code == (200 if is_listed else 405)
            assert (await gate.http.post(f"{route.path}/", json=body)).status_code == 404
            assert ("type" in (await gate.http.post(route.path, content=b"{")).json()) == ("messages" in route.path)
        assert [route for route, _ in gate.added] == [route.path for route in ENGINE_ROUTES]


def test_the_guard_allows_exactly_the_listed_routes() -> None:
    listed = [
        "completions",
        "chat/completions",
        "responses",
        "messages",
        "messages/count_tokens",
        "embeddings",
        "score",
        "rerank",
    ]
    others = {"/score", "/rerank", "/v2/rerank", "/tokenize", "/detokenize"}
    assert {route.path for route in ENGINE_ROUTES} == {f"/v1/{name}" for name in listed} | others
    gets = {("GET", "/v1/models"), ("GET", "/health"), ("GET", "/metrics")}
    assert gets | {("POST", route.path) for route in ENGINE_ROUTES} == ALLOWED


def test_the_gateway_offers_no_internal_route(tmp_path: Path) -> None:
    app = create_app(models=[], watch=None, registry=Registry(f"sqlite:///{tmp_path}/tandem.db"))  # type: ignore[arg-type]
    offered = {
        (method, route.path) for route in app.routes if isinstance(route, Route) for method in route.methods or ()
    }
    assert {("POST", route.path) for route in ENGINE_ROUTES} <= offered & ALLOWED
    own = {"/health", "/health/live", "/health/ready", "/openapi.json", "/v1/models", "/v1/models/{name:path}"}
    resources = ("responses/", "chat/completions", "files", "uploads", "batches", "fine_tuning/", "tandem/")
    prefixes = (*(f"/v1/{name}" for name in resources), "/admin/")
    assert {path for _, path in offered - ALLOWED if not path.startswith(prefixes)} == own
    assert ("GET", "/metrics") not in offered


@pytest.mark.parametrize(
    ("tasks", "route", "said"),
    [
        (("generate",), "/v1/embeddings", "served to embed"),
        (("generate",), "/rerank", "served to score"),
        (("embed", "score"), "/v1/chat/completions", "served to generate"),
        (("embed", "score"), "/v1/messages", "served to generate"),
    ],
)
async def test_a_route_that_a_model_lacks_is_a_400_that_names_those_it_has(
    tmp_path: Path, tasks: tuple[str, ...], route: str, said: str
) -> None:
    async with gateway(tmp_path, Reflecting(("base",), tasks=tasks)) as gate:
        answer = await gate.http.post(route, json={"model": "base"})
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400 and said in message
        assert "/tokenize" in message and ("/v1/embeddings" in message) == ("embed" in (*tasks, said.split()[-1]))
        assert (await gate.http.post("/tokenize", json={"model": "base", "prompt": "x"})).status_code == 200


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ({"prompt_logprobs": 0}, False),
        ({"echo": True, "logprobs": 0}, False),
        ({"echo": True, "top_logprobs": 2}, False),
        ({"echo": True}, True),
        ({"logprobs": True}, True),
        ({"echo": False, "logprobs": 2}, True),
    ],
)
async def test_logprobs_of_a_prompt_are_refused_where_they_would_end_the_engine(
    tmp_path: Path, asked: dict[str, Any], served: bool
) -> None:
    for max_adapters, ends in ((8, not served), (0, False)):
        async with gateway(tmp_path, Reflecting(("base",)), max_adapters=max_adapters) as gate:
            answer = await gate.http.post("/v1/completions", json={"model": "base", "prompt": "x", **asked})
            assert answer.status_code == (400 if ends else 200), answer.text


async def test_kv_transfer_params_of_clients_are_dropped(tmp_path: Path) -> None:
    where = {"kv_transfer_params": {"remote_host": "10.0.0.1"}, "ec_transfer_params": {"a": 1}}
    async with gateway(tmp_path, Reflecting(("base",))) as gate:
        asked = {"model": "base", "input": "x", **where, "vllm_xargs": {**where, "kept": 1}}
        sent = (await gate.http.post("/v1/responses", json=asked)).json()["request"]
        assert sent == {"model": "base", "input": "x", "vllm_xargs": {"kept": 1}, "store": False}


async def test_a_null_field_is_treated_as_absent(tmp_path: Path) -> None:
    async with gateway(tmp_path, Reflecting(("base",))) as gate:
        asked = {"model": "base", "input": "x", "encoding_format": None, "user": None}
        sent = await gate.http.post("/v1/embeddings", json=asked)
        assert sent.json()["request"] == {"model": "base", "input": "x"}


async def test_a_value_that_an_engine_would_fail_on_is_400_in_the_shape_of_the_api(tmp_path: Path) -> None:
    async with gateway(tmp_path, None) as gate:  # no engine: it is decided before one is asked
        schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}}
        for path, wrong, field in (
            ("/v1/chat/completions", {"structured_outputs": "x"}, "structured_outputs"),
            ("/v1/completions", {"top_k": 1e30}, "top_k"),
            ("/v1/chat/completions", {"response_format": schema}, "response_format.json_schema.schema"),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
            ("/v1/responses", {"stop": ["a", 5]}, "stop"),
        ):
            answer = await gate.http.post(path, json={"model": "base", **wrong})
            assert answer.status_code == 400, (wrong, answer.text)
            error = answer.json()["error"]
            assert (error["type"], error["param"]) == ("invalid_request_error", field)
            assert error["message"].startswith(f"`{field}` ")
        answer = await gate.http.post(
            "/v1/messages", json={"model": "base", "messages": [{"role": "user", "content": 3}]}
        )
        assert (answer.status_code, answer.json()["type"]) == (400, "error")
        assert answer.json()["error"]["message"].startswith("`messages.0.content` is a number;")


@pytest.mark.parametrize(("path", "fields"), [(path, field) for path, full in FULL.items() for field in full.items()])
async def test_a_required_field_that_is_missing_or_null_is_400(
    tmp_path: Path, path: str, fields: tuple[str, Any]
) -> None:
    field, _ = fields
    async with gateway(tmp_path, None) as gate:  # no engine: it is decided before one is asked
        rest = {key: value for key, value in FULL[path].items() if key != field}
        for body in ({"model": "base", **rest}, {"model": "base", **rest, field: None}):
            answer = await gate.http.post(path, json=body)
            assert answer.status_code == 400, (body, answer.text)
            assert f"is missing or null; a request to {path} must have it" in answer.json()["error"]["message"]


@pytest.mark.parametrize("in_front", [False, True])
async def test_a_response_has_its_id_once_under_each_sdks_header(tmp_path: Path, in_front: bool) -> None:
    async with gateway(tmp_path, Reflecting(("base",)), server_adds_request_id=in_front) as gate:
        for path, body in (
            ("/v1/messages", {"model": "base", **FULL["/v1/messages"]}),
            ("/v1/completions", {"model": "base", "prompt": "a"}),
            ("/v1/messages", {"model": "base"}),
            ("/v1/completions", {"model": "nobody"}),
        ):
            answer = await gate.http.post(path, json=body, headers={"x-request-id": "mine"})
            ids = [(name, value) for name, value in answer.headers.multi_items() if name.endswith("request-id")]
            expected = [("request-id", "mine")] if in_front else [("request-id", "mine"), ("x-request-id", "mine")]
            assert sorted(ids) == expected, (path, answer.status_code)
        message = await gate.anthropic().messages.create(
            model="base", max_tokens=5, messages=[{"role": "user", "content": "a"}]
        )
        assert message._request_id and message._request_id.startswith("req_")


async def test_the_number_of_stop_texts_is_left_to_the_engine(tmp_path: Path) -> None:
    # vLLM's limit is VLLM_MAX_STOP_STRINGS of a model's `env`.
    async with gateway(tmp_path, Reflecting(("base",))) as gate:
        sent = await gate.http.post("/v1/responses", json={"model": "base", "input": "x", "stop": ["a"] * 16})
        assert sent.status_code == 200 and sent.json()["request"]["stop"] == ["a"] * 16


async def test_where_nothing_is_stored_a_request_for_it_is_refused_with_the_alternative(tmp_path: Path) -> None:
    async with gateway(tmp_path, Reflecting(("base",)), stored=StoredConfig(enabled=False)) as gate:
        client = gate.openai()
        for asked in ({"store": True}, {"background": True}, {"previous_response_id": "resp_1"}, {"conversation": "c"}):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="base", input="x", **asked)  # type: ignore[call-overload]
            assert refused.value.param == next(iter(asked)) and " here" in refused.value.message
        with pytest.raises(openai.NotFoundError, match="stored for requests with `store` alone"):
            await client.responses.retrieve("resp_1")
        with pytest.raises(openai.NotFoundError):
            await client.responses.cancel("resp_1")
        with pytest.raises(openai.NotFoundError):
            await client.responses.delete("resp_1")
        sent = (await gate.http.post("/v1/responses", json={"model": "base", "input": "x"})).json()["request"]
        assert sent["store"] is False


ANTHROPIC_ERRORS = [
    (400, anthropic.BadRequestError, "invalid_request_error"),
    (404, anthropic.NotFoundError, "not_found_error"),
    (429, anthropic.RateLimitError, "rate_limit_error"),
    (500, anthropic.InternalServerError, "api_error"),
]


@pytest.mark.parametrize(("status", "kind", "name"), ANTHROPIC_ERRORS)
async def test_an_engines_error_has_anthropics_format_on_its_routes(
    tmp_path: Path, status: int, kind: type[anthropic.APIStatusError], name: str
) -> None:
    for said in (
        {"error": {"message": "so it is", "type": "BadRequestError", "param": None, "code": status}},
        {"type": "error", "error": {"message": "so it is", "type": "Bad Request"}},
    ):
        async with gateway(tmp_path, Scripted(status=status, body=said)) as gate:
            with pytest.raises(kind) as raised:
                await gate.anthropic().messages.create(**CHAT)
            assert raised.value.body["error"] == {"type": name, "message": "so it is"}  # type: ignore[index]
            assert raised.value.request_id == raised.value.body["request_id"]  # type: ignore[index]
            assert set(raised.value.body) == {"type", "error", "request_id"}  # type: ignore[call-overload]


async def test_the_gateways_errors_have_anthropics_format_on_its_routes(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        client = gate.anthropic()
        with pytest.raises(anthropic.NotFoundError) as unknown:
            await client.messages.create(**CHAT | {"model": "bas"})
        assert unknown.value.type == "not_found_error" and "Did you mean 'base'?" in str(unknown.value)
        with pytest.raises(anthropic.APIStatusError) as none_ready:
            await client.messages.create(**CHAT)
        assert (none_ready.value.status_code, none_ready.value.type) == (529, "overloaded_error")
        assert none_ready.value.response.headers["retry-after"] == "7"
        with pytest.raises(anthropic.APIStatusError) as large:
            await client.messages.create(**CHAT | {"system": "x" * 5000})
        assert (large.value.status_code, large.value.type) == (413, "request_too_large")
        answer = await gate.http.post("/v1/messages/count_tokens", content=b"{", headers={"x-request-id": "mine"})
        assert answer.json()["error"]["type"] == "invalid_request_error" and answer.json()["request_id"] == "mine"
        assert (await gate.http.get("/v1/messages")).json()["type"] == "error"
        assert set((await gate.http.get("/v1/completions")).json()) == {"error"}


async def test_without_a_replica_openais_sdk_sees_a_503_on_each_of_its_routes(tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        client = gate.openai()
        for ask in (
            client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}]),
            client.responses.create(model="base", input="x"),
            client.embeddings.create(model="base", input="x"),
        ):
            with pytest.raises(openai.InternalServerError) as raised:
                await ask
            assert raised.value.status_code == 503 and raised.value.code == "engine_unavailable"


CHUNK = b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"base","choices":[]}\n\n'


async def test_a_broken_completion_stream_raises_in_openais_sdk(tmp_path: Path) -> None:
    async with gateway(tmp_path, Scripted(CHUNK, CHUNK, breaks=True)) as gate:
        stream = await gate.openai().chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError) as raised:
            async for _ in stream:
                pass
        assert raised.value.code == "engine_unavailable" and "in the middle" in raised.value.message


async def test_an_engines_error_in_a_stream_has_openais_format(tmp_path: Path) -> None:
    said = b'data: {"error": {"message": "no memory", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
    async with gateway(tmp_path, Scripted(CHUNK + said + b"data: [DONE]\n\n")) as gate:
        stream = await gate.openai().chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError, match="no memory") as raised:
            async for _ in stream:
                pass
        assert (raised.value.type, raised.value.code) == ("server_error", None)


RESPONSE = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"x","sequence_number":%d}\n\n'


async def test_a_broken_responses_stream_ends_with_an_error_event(tmp_path: Path) -> None:
    async with gateway(tmp_path, Scripted(RESPONSE % 3 + RESPONSE % 4, breaks=True)) as gate:
        body = {"model": "base", "input": "x", "stream": True}
        text = (await gate.http.post("/v1/responses", json=body)).text
        assert text.rpartition("event: error\n")[2].startswith("data: ")
        event = httpx.Response(200, text=text.rpartition("data: ")[2]).json()
        assert (event["type"], event["sequence_number"], event["code"]) == ("error", 5, "engine_unavailable")
        assert event["message"] == event["error"]["message"]
        with pytest.raises(openai.APIError, match="in the middle"):
            async for _ in await gate.openai().responses.create(model="base", input="x", stream=True):
                pass


START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",'
    b'"content":[],"model":"base","usage":{"input_tokens":1,"output_tokens":0}}}\n\n'
)


@pytest.mark.parametrize(
    "engine",
    [
        Scripted(START, breaks=True),
        Scripted(
            START + b'event: error\ndata: {"type":"error","error":{"type":"internal_error","message":"no memory"}}\n\n'
        ),
        Scripted(
            START,
            b'event: error\ndata: {"type":"error","error":{"type":"internal_error",'
            b'"message":"1 validation error for ChatCompletionStreamResponse"}}\n\n',
        ),
    ],
)
async def test_a_stream_of_messages_that_fails_raises_anthropics_api_error(tmp_path: Path, engine: Scripted) -> None:
    async with gateway(tmp_path, engine) as gate:
        with pytest.raises(anthropic.APIStatusError) as raised:
            async with gate.anthropic().messages.stream(**CHAT) as stream:
                async for _ in stream:
                    pass
        assert raised.value.type == "api_error" and raised.value.body["request_id"]  # type: ignore[index]
        assert "in the middle" in str(raised.value) or "no memory" in str(raised.value)
        assert "validation error" not in str(raised.value)


async def test_text_that_looks_like_an_error_passes_untouched(tmp_path: Path) -> None:
    text = b'data: {"choices":[{"index":0,"text":"data: {\\"error\\": 1}\\nevent: error\\n"}]}\n\n'
    async with gateway(tmp_path, Scripted(text)) as gate:
        for route in ("/v1/completions", "/v1/messages"):
            body = {"model": "base", "stream": True, **FULL[route]}
            assert (await gate.http.post(route, json=body)).content == text


async def test_the_added_latency_is_in_a_header_and_recorded(tmp_path: Path) -> None:
    async with gateway(tmp_path, EchoEngine(("base",), delay_s=0.3)) as gate:
        answer = await gate.http.post("/v1/completions", json={"model": "base", "prompt": "one"})
        spent = latency.parse(answer.headers["server-timing"])
        assert spent["engine"] > 250 > spent["gateway"] > 0
        ((route, added_ms),) = gate.added
        assert route == "/v1/completions" and abs(added_ms - spent["gateway"]) < 0.001


# ---- What is wrong with a request and what its client is told


async def test_an_unknown_field_is_answered_with_a_warning(tmp_path: Path) -> None:
    async with gateway(tmp_path, Reflecting(("base",))) as gate:
        answer = await gate.http.post("/v1/chat/completions", json={**CHAT, "temperatur": 1, "max_tokns": 2})
        assert answer.status_code == 200
        said = answer.headers["x-tandem-warning"]
        assert "unknown field 'temperatur'; did you mean 'temperature'?" in said and "'max_tokens'" in said
        plain = await gate.http.post("/v1/chat/completions", json={**CHAT, "temperature": 1, "timeout": 5})
        assert "x-tandem-warning" not in plain.headers
        odd = await gate.http.post("/v1/chat/completions", json={**CHAT, "\u00fc\r\nx: y" * 99: 1})
        assert odd.status_code == 200 and odd.headers["x-tandem-warning"].isascii() and "x" not in odd.headers


async def test_an_unknown_field_is_an_error_where_that_is_strict(tmp_path: Path) -> None:
    async with gateway(tmp_path, Reflecting(("base",)), strict=True) as gate:
        answer = await gate.http.post("/v1/messages", json={**CHAT, "temperatur": 1})
        assert answer.status_code == 400 and "temperature" in answer.json()["error"]["message"]
        assert (await gate.http.post("/v1/messages", json=CHAT)).status_code == 200
    async with gateway(tmp_path, Reflecting(("base",))) as gate:
        asked = {"json": {**CHAT, "temperatur": 1}, "headers": {"x-tandem-strict": "true"}}
        error = (await gate.http.post("/v1/chat/completions", **asked)).json()["error"]
        assert (error["param"], error["code"]) == ("temperatur", "unknown_field")


async def test_a_compressed_body_is_415_in_the_apis_shape(tmp_path: Path) -> None:
    body = gzip.compress(json.dumps(CHAT).encode())
    async with gateway(tmp_path, Reflecting(("base",))) as gate:
        for path in ("/v1/chat/completions", "/v1/messages"):
            answer = await gate.http.post(path, content=body, headers={"content-encoding": "gzip"})
            assert answer.status_code == 415 and "gzip" in answer.json()["error"]["message"]
        kept = await gate.http.post("/v1/chat/completions", json=CHAT, headers={"content-encoding": "identity"})
        assert kept.status_code == 200


async def test_tools_at_a_model_without_them_are_refused_plainly(tmp_path: Path) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "weather"}}]}
    async with gateway(tmp_path, Reflecting(("base",)), tools=False) as gate:
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
            asked = {**CHAT, **tools, "input": "hello"}
            answer = await gate.http.post(path, json=asked)
            assert answer.status_code == 400 and "'base' takes no tools" in answer.json()["error"]["message"]
            assert (await gate.http.post(path, json={**asked, "tool_choice": "none"})).status_code == 200
    body = {
        "error": {"message": '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'}
    }
    async with gateway(tmp_path, Scripted(status=400, body=body)) as gate:
        error = (await gate.http.post("/v1/chat/completions", json=CHAT)).json()["error"]
        assert "'base' takes no tools" in error["message"] and "parser" not in error["message"]
