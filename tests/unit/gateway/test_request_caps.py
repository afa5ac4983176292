"""Caps on requests: what one request may ask of an engine, and what it counts in the queue."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from overload_world import ROUTE, Listening, overload_world

from tandem.config import GatewayConfig, RequestCaps
from tandem.config.load import from_dict
from tandem.engine.routes import ENGINE_ROUTES
from tandem.errors import ConfigError
from tandem.gateway.errors import ApiError
from tandem.gateway.requests.request_caps import check_caps

ROUTES = {route.path: route for route in ENGINE_ROUTES}
CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {f"p{place}": {"type": "string"} for place in range(3000)}}
ABOVE: list[tuple[str, dict[str, Any], str, str, str]] = [
    (ROUTE, {"prompt": "a", "n": 17}, "n", "17", "n"),
    (ROUTE, {"prompt": "a", "n": "16384"}, "n", "16,384", "n"),
    (ROUTE, {"prompt": "a", "best_of": 17}, "best_of", "17", "n"),
    (CHAT, {"n": 17}, "n", "17", "n"),
    (ROUTE, {"prompt": ["a"] * 129}, "prompt", "129", "sequences"),
    (ROUTE, {"prompt": ["a"] * 9, "n": 16}, "prompt", "144", "sequences"),
    (ROUTE, {"prompt": "a", "logprobs": 21}, "logprobs", "21", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "-1", "logprobs"),
    (ROUTE, {"prompt": "a", "prompt_logprobs": 1000}, "prompt_logprobs", "1,000", "logprobs"),
    (CHAT, {"stop": ["x"] * 17}, "stop", "17", "stop"),
    (CHAT, {"stop": "x" * 1025}, "stop", "1,025", "stop_chars"),
    ("/v1/messages", {"stop_sequences": ["a", "x" * 1025]}, "stop_sequences", "1,025", "stop_chars"),
    (CHAT, {"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "1,025", "listed"),
    (CHAT, {"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", "4,097", "messages"),
    ("/v1/responses", {"input": [{"role": "user", "content": "x"}] * 4097}, "input", "4,097", "messages"),
    (CHAT, {"tools": [{"type": "function"}] * 129}, "tools", "129", "tools"),
    (CHAT, {"response_format": {"json_schema": {"schema": SCHEMA}}}, "response_format", "", "schema_bytes"),
    (CHAT, {"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs", "", "schema_bytes"),
    (CHAT, {"tools": [{}, {"function": {"parameters": SCHEMA}}]}, "tools.1", "", "schema_bytes"),
    ("/v1/embeddings", {"input": ["a"] * 2049}, "input", "2,049", "inputs"),
    ("/v1/embeddings", {"input": ["a"] * 257, "encoding_format": "bytes"}, "input", "257", ""),
    ("/v1/rerank", {"query": "a", "documents": ["a"] * 2048}, "documents", "2,049", "inputs"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "value", "key"), ABOVE)
def test_a_value_above_its_cap_is_400_with_field_value_and_cap(
    path: str, body: dict[str, Any], param: str, value: str, key: str
) -> None:
    with pytest.raises(ApiError) as error:
        check_caps(ROUTES[path], body, RequestCaps(), len(json.dumps(body)))
    assert error.value.status == 400 and error.value.param == param and error.value.code
    assert f"`{param}`" in error.value.message and value in error.value.message and len(error.value.message) < 300
    assert not key or f"(gateway.caps.{key})" in error.value.message


WITHIN: list[tuple[str, dict[str, Any], int]] = [
    (ROUTE, {"prompt": ["a"] * 8, "n": 16, "logprobs": 20, "stop": ["x" * 1024] * 16}, 128),
    (CHAT, {"messages": [{"role": "user", "content": "x"}] * 4096, "tools": [{"type": "function"}] * 128}, 1),
    ("/v1/embeddings", {"input": ["a"] * 2048}, 2048),
    ("/v1/embeddings", {"input": ["a"] * 256, "encoding_format": "bytes"}, 256),
    ("/v1/embeddings", {"input": list(range(5000))}, 1),
    # Long text is limited by the model's length and by the body's size.
    (CHAT, {"messages": [{"role": "user", "content": "x" * 1_000_000}]}, 1),
]


@pytest.mark.parametrize(("path", "body", "sequences"), WITHIN)
def test_values_up_to_the_caps_pass_and_count_their_sequences(path: str, body: dict[str, Any], sequences: int) -> None:
    assert check_caps(ROUTES[path], body, RequestCaps(), len(json.dumps(body))) == sequences


def test_caps_are_configured_by_name_and_checked() -> None:
    caps = from_dict(GatewayConfig, {"caps": {"n": 2, "logprobs": -1}}).caps
    with pytest.raises(ApiError, match=r"`n` is 3; at most 2 here \(gateway.caps.n\)"):
        check_caps(ROUTES[ROUTE], {"prompt": "a", "n": 3}, caps, 10)
    assert check_caps(ROUTES[ROUTE], {"prompt": "a", "logprobs": -1}, caps, 10) == 1
    with pytest.raises(ConfigError, match="gateway.caps.stop is 0"):
        RequestCaps(stop=0)


async def test_a_request_with_n_waits_for_as_many_slots_and_reaches_no_engine_above_the_cap(tmp_path: Path) -> None:
    async with overload_world(tmp_path, requests_per_replica=4, max_queued=5) as world:
        engine = Listening(delay_s=0.02)
        await world.add(engine)
        refused = await world.http.post(ROUTE, json={"model": "base", "prompt": "x", "n": 16384, "max_tokens": 300})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
        wide = world.ask("wide", 40, n=3)
        await world.until(lambda: engine.asked == ["wide"])
        assert (world.queue.running, world.queue.sequences) == (1, 3)
        first, second = world.ask("first", 40), world.ask("second")
        await world.queued(1)
        assert [(await each).status_code for each in (wide, first, second)] == [200] * 3
        assert engine.asked == ["wide", "first", "second"] and world.queue.sequences == 0


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_routes_that_count_tokens_take_bodies_up_to_a_cap_and_count_them_by_size(path: str) -> None:
    body: dict[str, Any] = {"prompt": "x"}
    assert [check_caps(ROUTES[path], body, RequestCaps(), size) for size in (10, 65_536, 2**20)] == [1, 2, 17]
    with pytest.raises(ApiError, match="1,048,577 bytes") as error:
        check_caps(ROUTES[path], body, RequestCaps(), 2**20 + 1)
    assert error.value.status == 413 and "gateway.caps.light_bytes" in error.value.message


async def test_only_so_many_bytes_of_text_are_converted_at_once_and_the_rest_waits(tmp_path: Path) -> None:
    async with overload_world(tmp_path, requests_per_replica=1, max_queued=2) as world:
        engine = Counting()
        await world.add(engine)
        text = "x" * 300_000  # takes 5 of the 16 units of a replica
        asked = [
            asyncio.create_task(world.http.post("/tokenize", json={"model": "base", "prompt": text})) for _ in range(6)
        ]
        await world.until(lambda: engine.inside == 3)
        await world.queued(2)
        # The sixth is refused, and generation goes on beside them.
        await world.until(lambda: any(each.done() for each in asked))
        (refused,) = [each.result() for each in asked if each.done()]
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert (await world.ask("generated")).status_code == 200 and engine.inside == 3
        engine.open.set()
        answers = [(await each).status_code for each in asked]
        assert sorted(answers) == [200] * 5 + [429] and engine.most == 3


class Counting(Listening):
    """Answers other routes than completions once it is `open`."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.inside = self.most = 0

    async def _reflect(self, request: Any) -> Any:
        self.inside += 1
        self.most = max(self.most, self.inside)
        try:
            while not self.open.is_set():
                await asyncio.sleep(0.01)
            return await super()._reflect(request)
        finally:
            self.inside -= 1
