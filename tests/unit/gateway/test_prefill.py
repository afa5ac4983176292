"""Disaggregated prefill is used only where a decode replica of the same version can fetch the KV cache."""

from __future__ import annotations

import gc
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic_core import from_json, to_json

from tandem.config import ServedModelConfig
from tandem.config.serving.app import PrefillConfig
from tandem.gateway.dialect import dialect_of
from tandem.gateway.models.catalog import ResolvedModel
from tandem.gateway.prefill import with_prefill
from tandem.gateway.replicas.upstream import EngineRequest
from tandem.gateway.requests.request_hints import SchedulingHints, read_routing_request
from tandem.gateway.retry_budget import RetryBudget
from tandem.routing.records import ServedModel

PATH, BODY = "/v1/completions", {"model": "base@2", "prompt": "a long prompt"}
SERVED = ServedModel(
    id="base@2",
    name="base",
    path="/models/base",
    config=ServedModelConfig(model="base@2", engine="vllm", prefill=PrefillConfig()),
)
TRANSFER = {"remote_host": "10.0.0.7"}


class Relay:
    """Answers the prefill request with the place of the KV cache; `pools` have a ready replica."""

    def __init__(self, *pools: str) -> None:
        self.fleet = SimpleNamespace(has_pool=lambda pool: pool in pools)
        self.prefills = 0

    async def first_answer(self, request: Any, budget: Any, resources: AsyncExitStack, give_up: Any) -> Any:
        self.prefills += 1

        async def read() -> bytes:
            return b'{"kv_transfer_params": {"remote_host": "10.0.0.7"}}'

        return SimpleNamespace(response=SimpleNamespace(status=200, read=read), first_chunk=b"")


def request() -> EngineRequest:
    model = ResolvedModel(base=SERVED)
    return EngineRequest(
        path=PATH,
        body=b'{"model":"base@2","prompt":"a long prompt"}',
        model=model,
        headers={},
        dialect=dialect_of(PATH),
        routing=read_routing_request(model, dict(BODY), {}),
        hints=SchedulingHints(arrived=0.0),
    )


def pools() -> tuple[str, str]:
    """The pools of decode and prefill replicas."""
    decode = ResolvedModel(base=SERVED)
    return decode.pool, ResolvedModel(base=SERVED, prefill=True).pool


async def test_the_request_carries_the_place_of_the_kv_cache_and_is_pinned_to_its_version() -> None:
    relay = Relay(*pools())
    made = await with_prefill(relay, request(), RetryBudget())  # type: ignore[arg-type]
    assert from_json(made.body)["kv_transfer_params"] == TRANSFER and made.routing.pinned


@pytest.mark.parametrize("missing", ["decode", "prefill"])
async def test_without_a_ready_replica_of_both_pools_the_request_is_unchanged(missing: str) -> None:
    decode, prefill = pools()
    relay = Relay(prefill if missing == "decode" else decode)
    asked = request()
    assert await with_prefill(relay, asked, RetryBudget()) is asked  # type: ignore[arg-type]
    assert relay.prefills == 0


async def test_no_parsed_body_is_kept_while_the_prefill_replica_answers() -> None:
    body = {"model": "base@2", "prompt": "a prompt of this test alone", "stop": ["x"]}

    class Looking(Relay):
        parsed = 0

        async def first_answer(self, *args: Any) -> Any:
            gc.collect()
            known = [each for each in gc.get_objects() if type(each) is dict and each.get("prompt") == body["prompt"]]
            self.parsed = len([each for each in known if each is not body])
            return await super().first_answer(*args)

    relay = Looking(*pools())
    made = await with_prefill(relay, replace(request(), body=to_json(body)), RetryBudget())  # type: ignore[arg-type]
    assert from_json(made.body) == {**body, "kv_transfer_params": TRANSFER} and relay.parsed == 0
