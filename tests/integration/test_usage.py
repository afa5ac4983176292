"""Usage in the database is what vLLM itself says, on every route and however a request ends."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from serve_fixtures import Served

from tandem.usage import UsageStore

PROMPT = "the cat sat on the mat"
CHAT = {"messages": [{"role": "user", "content": PROMPT}]}


def sums(served: Served) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Requests, prompt tokens and generated tokens so far, by route and adapter."""
    with UsageStore(f"sqlite:///{served.home}/tandem.db") as store:
        return {
            (row["route"], row["adapter"]): (row["requests"], row["prompt_tokens"], row["completion_tokens"])
            for row in store.sums(("route", "adapter"))
        }


def charged(served: Served, before: dict[tuple[str, str], tuple[int, int, int]], requests: int) -> dict[Any, Any]:
    """What was added since `before`, once that many requests more are written."""
    deadline = time.monotonic() + 20
    while True:
        added = {}
        for key, now in sums(served).items():
            change = tuple(a - b for a, b in zip(now, before.get(key, (0, 0, 0)), strict=True))
            if any(change):
                added[key] = change
        if sum(change[0] for change in added.values()) >= requests:
            return added
        assert time.monotonic() < deadline, added
        time.sleep(0.3)


REQUESTS = [
    ("/v1/completions", {"model": "red", "prompt": [PROMPT, "one two"], "n": 2, "max_tokens": 5}),
    ("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "stop": ["a"]}),
    ("/v1/chat/completions", {"model": "tiny", **CHAT, "max_tokens": 7}),
    ("/v1/messages", {"model": "tiny", **CHAT, "max_tokens": 6}),
    ("/v1/responses", {"model": "tiny", "input": PROMPT, "max_output_tokens": 6}),
]


@pytest.mark.parametrize(("route", "body"), REQUESTS)
def test_a_whole_answer_is_charged_what_its_usage_says(served: Served, route: str, body: dict[str, Any]):
    before = sums(served)
    answer = httpx.post(served.url + route, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    told = (1, *(usage.get(f"{new}_tokens", usage.get(f"{old}_tokens")) for new, old in TOLD))
    adapter = "red@1" if body["model"] == "red" else ""
    assert charged(served, before, 1) == {(route, adapter): told}


TOLD = (("prompt", "input"), ("completion", "output"))


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_is_charged_what_its_usage_would_say(served: Served, route: str):
    before = sums(served)
    body = {"model": "tiny", "prompt": PROMPT} if route == "/v1/completions" else {"model": "tiny", **CHAT}
    body |= {"max_tokens": 9, "temperature": 0, "ignore_eos": True}
    usage = httpx.post(served.url + route, json=body, timeout=60).json()["usage"]
    streamed = httpx.post(served.url + route, json={**body, "stream": True}, timeout=60).text
    assert streamed.endswith("data: [DONE]\n\n") and "usage" not in streamed
    told = (2, 2 * usage["prompt_tokens"], 2 * usage["completion_tokens"])
    assert charged(served, before, 2) == {(route, ""): told}


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_left_is_charged_what_the_engine_generated(served: Served, stream: bool):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    before, generated = sums(served), served.metric("vllm:generation_tokens_total")
    with pytest.raises((httpx.ReadTimeout, TimeoutError)):
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=httpx.Timeout(2.0)) as answer:
            began = time.monotonic()
            for _ in answer.iter_bytes():
                if time.monotonic() - began > 1.5:
                    raise TimeoutError
    ((requests, prompt, completion),) = charged(served, before, 1).values()
    generated = served.metric("vllm:generation_tokens_total") - generated
    assert requests == 1 and prompt > 0 and 10 < completion < 1900
    # The engine may have made one step more when it heard of the end.
    assert abs(completion - generated) <= 2
