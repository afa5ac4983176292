from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tandem.engine.create import create_engine
from tandem.engine.echo.engine import EchoEngine
from tandem.engine.spec import EngineSpec
from tandem.engine.ttft import WINDOW_S, TtftWindow
from tandem.errors import ConfigError


def client(engine: EchoEngine) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=engine.app), base_url="http://echo")


async def test_the_echo_engine_answers_with_the_prompt_streamed_or_not() -> None:
    async with client(EchoEngine()) as http:
        body = {"model": "echo", "messages": [{"role": "user", "content": "a b c"}], "max_tokens": 2}
        whole = (await http.post("/v1/chat/completions", json=body)).json()
        assert whole["choices"][0]["message"]["content"] == "a b"
        assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        text = (await http.post("/v1/chat/completions", json=body | {"stream": True})).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"]["content"] for e in events[:-1]) == "a b"


async def test_the_echo_engine_refuses_unknown_models_and_long_prompts() -> None:
    async with client(EchoEngine(max_length=3)) as http:
        assert (await http.post("/v1/completions", json={"model": "x", "prompt": "a"})).status_code == 404
        answer = await http.post("/v1/completions", json={"model": "echo", "prompt": "a b c d"})
        assert answer.status_code == 400 and "4 tokens; the model takes 3" in answer.text


async def test_a_route_that_the_echo_engine_lacks_is_404() -> None:
    async with client(EchoEngine()) as http:
        assert (await http.post("/v1/embeddings", json={"model": "echo", "input": "a"})).status_code == 404


def test_the_factory_picks_engines_by_kind_and_checks_their_arguments() -> None:
    spec = EngineSpec(kind="echo", id="m@1", name="m", path="", args={"delay_s": 0.1})
    assert isinstance(create_engine(spec), EchoEngine)
    with pytest.raises(ConfigError, match="Did you mean 'delay_s'"):
        create_engine(EngineSpec(kind="echo", id="m@1", name="m", path="", args={"delay": 0.1}))
    with pytest.raises(ConfigError, match="must be one of auto, vllm, echo. Did you mean 'vllm'"):
        create_engine(EngineSpec(kind="vlm", id="m@1", name="m", path=""))


async def test_the_echo_engine_with_slots_reports_waiting_requests() -> None:
    engine = EchoEngine(delay_s=0.05, slots=2)
    async with client(engine) as http:
        body = {"model": "echo", "prompt": "a b c", "stream": True}
        asked = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(5)]
        async with asyncio.timeout(30):
            while (stats := engine.stats()).waiting < 3:
                await asyncio.sleep(0.005)
        assert (stats.running, stats.waiting, stats.max_running) == (2, 3, 2)
        # Who leaves while waiting is not waited with.
        asked.pop().cancel()
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in await asyncio.gather(*asked))
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    # The third waited for three words of the first, and then its own.
    assert stats.ttft_s > 0.15


def test_the_ttft_window_returns_the_90th_percentile_of_the_last_seconds() -> None:
    tokens = TtftWindow()
    assert tokens.percentile_90(0.0) == 0.0
    tokens.add([0.1] * 9 + [5.0], 0.0)
    assert tokens.percentile_90(1.0) == 0.1
    tokens.add([2.0], 1.0)
    assert tokens.percentile_90(1.0) == 2.0
    assert tokens.percentile_90(WINDOW_S + 0.5) == 2.0
    assert tokens.percentile_90(WINDOW_S + 1.5) == 0.0


async def test_an_answer_has_an_end_whatever_its_limit_is() -> None:
    engine = EchoEngine(("base",))
    await engine.start()
    transport = httpx.ASGITransport(app=engine.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        body = {"model": "base", "prompt": "one two", "max_tokens": 2**70}
        assert (await client.post("/v1/completions", json=body)).json()["usage"]["completion_tokens"] == 2
