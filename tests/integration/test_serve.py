"""The served app through the openai SDK: real Ray, real HAProxy, a real vLLM engine."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from serve_fixtures import MAX_LENGTH, PROMPTS, Served, greedy_tokens, write_adapter

TOKENS = 24


def tokens(served: Served, model: str, prompt: str) -> list[int]:
    answer = served.client().completions.create(
        model=model, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"return_token_ids": True}
    )
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["tiny", "red", "blue"])
def test_greedy_tokens_are_those_of_hugging_face_and_peft(served: Served, model: str) -> None:
    expected = [greedy_tokens(served.base, served.adapters.get(model), prompt, TOKENS) for prompt in PROMPTS]
    assert [tokens(served, model, prompt) for prompt in PROMPTS] == expected


def test_base_and_adapters_answer_side_by_side(served: Served) -> None:
    jobs = [(model, prompt) for model in ("tiny", "red", "blue") for prompt in PROMPTS]
    alone = [tokens(served, *job) for job in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: tokens(served, *job), jobs))
    assert together == alone
    assert alone[0] != alone[3] != alone[6]


def test_a_chat_streams_what_it_answers_whole(served: Served) -> None:
    client = served.client()
    options: dict[str, Any] = {
        "model": "red",
        "messages": [{"role": "user", "content": "the cat"}],
        "max_tokens": 20,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.model == "red@1"


def test_many_streams_at_once_are_all_whole(served: Served) -> None:
    async def run() -> list[int]:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="test", timeout=120)

        async def one(i: int) -> int:
            stream = await client.completions.create(
                model=("tiny", "red", "blue")[i % 3],
                prompt=PROMPTS[0],
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            return [c.usage.completion_tokens async for c in stream if c.usage][-1]

        return list(await asyncio.gather(*(one(i) for i in range(24))))

    assert asyncio.run(run()) == [40] * 24


def test_models_lists_bases_and_their_adapters(served: Served) -> None:
    client = served.client()
    listed = {model.id: model.model_dump() for model in client.models.list().data}
    assert {"tiny", "red", "blue"} <= set(listed)
    assert listed["red"]["parent"] == "tiny" and listed["red"]["root"] == "red@1"
    assert listed["tiny"]["max_model_len"] == MAX_LENGTH
    assert client.models.retrieve("red@1").model_dump()["root"] == "red@1"


def test_an_adapter_registered_now_answers_the_next_request_and_a_new_version_the_one_after(served: Served) -> None:
    registry = served.registry()
    with pytest.raises(openai.NotFoundError):
        tokens(served, "fresh", PROMPTS[0])
    registry.register_adapter("fresh", served.adapters["green"], base="tiny")
    assert tokens(served, "fresh", PROMPTS[0]) == greedy_tokens(
        served.base, served.adapters["green"], PROMPTS[0], TOKENS
    )
    second = write_adapter(served.home / "fresh-2", served.base, seed=9)
    registry.register_adapter("fresh", second, base="tiny")
    expected = greedy_tokens(served.base, second, PROMPTS[0], TOKENS)
    assert tokens(served, "fresh", PROMPTS[0]) == expected == tokens(served, "fresh@2", PROMPTS[0])
    assert tokens(served, "fresh@1", PROMPTS[0]) != expected
    registry.remove("fresh")
    with pytest.raises(openai.NotFoundError):
        tokens(served, "fresh", PROMPTS[0])


def test_more_adapters_than_slots_take_turns(served: Served) -> None:
    registry = served.registry()
    registry.register_adapter("third", served.adapters["green"], base="tiny")
    expected = {name: greedy_tokens(served.base, served.adapters[name], PROMPTS[1], TOKENS) for name in ("red", "blue")}
    expected["third"] = greedy_tokens(served.base, served.adapters["green"], PROMPTS[1], TOKENS)
    for name in ("red", "blue", "third") * 2:
        assert tokens(served, name, PROMPTS[1]) == expected[name]
    with ThreadPoolExecutor(9) as pool:
        jobs = list(expected) * 3
        assert list(pool.map(lambda name: tokens(served, name, PROMPTS[1]), jobs)) == [expected[n] for n in jobs]
    # It tells its slots with each beat.
    deadline = time.monotonic() + 30
    while len(served.replicas()[0].slots) != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(served.replicas()[0].slots) == 2 and set(served.replicas()[0].adapters) >= {"red@1", "blue@1"}
    registry.remove("third")


def test_an_adapter_that_does_not_fit_is_refused_with_both_ranks(served: Served) -> None:
    wide = write_adapter(served.home / "wide", served.base, seed=5, rank=16)
    served.registry().register_adapter("wide", wide, base="tiny")
    with pytest.raises(openai.BadRequestError, match=r"rank 16.*max_lora_rank 8"):
        tokens(served, "wide", PROMPTS[0])
    served.registry().remove("wide")


def test_an_unknown_model_is_a_404_with_the_nearest_name(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        served.client().completions.create(model="tinny", prompt="x")
    assert caught.value.code == "model_not_found"
    assert "Did you mean 'tiny'?" in str(caught.value)


def test_a_prompt_longer_than_the_model_is_a_400_with_both_numbers(served: Served) -> None:
    long = "cat " * (MAX_LENGTH + 44)
    for ask in (
        lambda client: client.completions.create(model="tiny", prompt=long, max_tokens=1),
        lambda client: client.chat.completions.create(model="red", messages=[{"role": "user", "content": long}]),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(served.client())
        assert caught.value.code == "context_length_exceeded"
        numbers = {int(word) for word in caught.value.message.replace(".", " ").split() if word.isdigit()}
        assert MAX_LENGTH in numbers and any(n > MAX_LENGTH for n in numbers)


MALFORMED: list[tuple[str, bytes]] = [
    ("/v1/completions", b""),
    ("/v1/completions", b"{"),
    ("/v1/completions", b"\xff\xfe"),
    ("/v1/completions", b"[" * 40_000),
    *(
        ("/v1/completions", json.dumps(body).encode())
        for body in (
            [],
            {"prompt": "x"},
            {"model": 7, "prompt": "x"},
            {"model": "tiny"},
            {"model": "tiny", "prompt": {}},
            {"model": "tiny", "prompt": [999_999]},
            {"model": "tiny", "prompt": "x", "max_tokens": -1},
            {"model": "tiny", "prompt": "x", "n": 10**9},
            {"model": "tiny", "prompt": "x", "temperature": "hot"},
            {"model": "tiny", "prompt": "x", "stream": "maybe"},
            {"model": "tiny", "prompt": "x", "logit_bias": {"999999": 1}},
            {"model": "tiny", "prompt": "\ud800"},
        )
    ),
    *(
        ("/v1/chat/completions", json.dumps({"model": "red", **body}).encode())
        for body in (
            {},
            {"messages": None},
            {"messages": []},
            {"messages": [1]},
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            {"messages": [{"role": "user", "content": "x"}], "tools": "x"},
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "zzz"}},
        )
    ),
]


def test_malformed_bodies_are_400_in_openais_shape_and_never_500(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        for path, body in MALFORMED:
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (body[:80], answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, body[:80]
        assert client.post("/v1/completions", json={"prompt": " " * 3 * 2**20}).status_code == 413
        assert client.get("/v1/nothing").status_code == 404
        assert client.get("/health").json() == {"status": "ok", "ready_replicas": {"tiny": 1}}


def test_the_engine_answers_nobody_without_its_token(served: Served) -> None:
    (replica,) = served.replicas()
    body = {"model": "tiny@1", "prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{replica.url}/v1/completions", json=body).status_code == 401
    headers = {"x-tandem-token": "wrong"}
    assert httpx.post(f"{replica.url}/v1/completions", json=body, headers=headers).status_code == 401
    headers = {"x-tandem-token": replica.token}
    assert httpx.post(f"{replica.url}/v1/completions", json=body, headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_its_generation_in_the_engine(served: Served, stream: bool) -> None:
    prompts, tokens_each = 16, 1900
    body = {
        "model": "tiny",
        "prompt": ["the cat"] * prompts,
        "max_tokens": tokens_each,
        "ignore_eos": True,
        "stream": stream,
    }
    before = served.metric("vllm:generation_tokens_total")
    if stream:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as answer:
            next(answer.iter_raw())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.5))
    deadline = time.monotonic() + 60
    while served.replicas()[0].running and time.monotonic() < deadline:
        time.sleep(0.2)
    # The gateway writes a line for each request that has ended there.
    assert served.replicas()[0].running == 0, served.access_log()[-3:]
    done = served.metric("vllm:generation_tokens_total")
    time.sleep(1.0)
    assert served.metric("vllm:generation_tokens_total") == done
    assert done - before < prompts * tokens_each
