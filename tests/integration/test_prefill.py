"""Prompts read on one replica, answers generated on another: the KV cache moves between two real engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serve_fixtures import Served, greedy_tokens

pytestmark = pytest.mark.slow  # two vLLM engines of its own

PROMPT = "the cat sat on the mat and the dog ran over the hill " * 30
SHORT = "the cat sat on the mat"
TOKENS = 12


@pytest.fixture(scope="module")
def app(served: Served) -> Iterator[Served]:
    """A model with one replica that reads prompts and one that generates, below `/split`."""
    pytest.importorskip(
        "nixl", reason="the library that moves the cache is an extra: pip install tandem[disaggregation]"
    )
    from ray import serve

    from tandem.apps.build import build_app
    from tandem.config import PrefillConfig, ServeConfig, ServedModelConfig

    split = ServedModelConfig(
        model=str(served.base),
        name="split",
        max_adapters=0,
        cpus_per_replica=0.5,
        prefill=PrefillConfig(min_bytes=500),
    )
    serve.run(build_app(ServeConfig(models=(split,), app="split")), name="split", route_prefix="/split")
    yield Served(url=f"{served.url}/split", home=served.home, base=served.base, app="split")
    serve.delete("split", _blocking=False)


def metric(replica: Any, name: str) -> float:
    """A counter of one replica's engine."""
    text = httpx.get(f"{replica.url}/metrics", headers={"x-tandem-token": replica.token}, timeout=30).text
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + "{"))


def ask(app: Served, prompt: str, **more: Any) -> list[int]:
    """The tokens of a greedy completion."""
    answer = app.client().completions.create(
        model="split", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"return_token_ids": True}, **more
    )
    return list(answer.choices[0].model_extra["token_ids"])


def test_a_long_prompt_is_read_by_one_replica_and_answered_by_the_other(app: Served) -> None:
    replicas = {r.pool.rpartition("#")[2]: r for r in app.replicas()}
    assert sorted(replicas) == ["prefill", "split"]
    before = metric(replicas["prefill"], "vllm:generation_tokens_total")
    assert ask(app, PROMPT) == greedy_tokens(app.base, None, PROMPT, TOKENS)
    assert metric(replicas["prefill"], "vllm:generation_tokens_total") == before + 1
    assert metric(replicas["split"], "vllm:external_prefix_cache_hits_total") > 0


def test_a_short_prompt_is_read_where_it_is_answered(app: Served) -> None:
    replicas = {r.pool.rpartition("#")[2]: r for r in app.replicas()}
    before = metric(replicas["prefill"], "vllm:generation_tokens_total")
    assert ask(app, SHORT) == greedy_tokens(app.base, None, SHORT, TOKENS)
    assert metric(replicas["prefill"], "vllm:generation_tokens_total") == before


def test_a_stream_comes_from_the_replica_that_generates(app: Served) -> None:
    asked = {"model": "split", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    whole = app.client().completions.create(**asked)
    chunks = list(app.client().completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert len(chunks) > 1
