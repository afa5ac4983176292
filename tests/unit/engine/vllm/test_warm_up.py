"""Warm-up requests of an engine, and refused ones."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tandem.api.unknown_fields import unknown_fields
from tandem.engine.vllm.warm_up import LARGEST_N, RANK_HEADER, WarmUpFeatures, warm_up, warm_up_batches
from tandem.errors import EngineError

ALL = WarmUpFeatures(model="m", tasks=("generate",), chat=True, tools=True, prompt_logprobs=True)


def test_the_first_sampled_request_is_alone_and_every_kind_follows() -> None:
    first, *rest = warm_up_batches(ALL)
    assert [request.body["temperature"] for request in first] == [1.0] and "n" not in first[0].body
    fields = {field for batch in rest for request in batch for field in request.body}
    assert fields >= {
        "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "logprobs",
        "prompt_logprobs", "logit_bias", "bad_words", "n", "stream", "response_format", "tools",
    }  # fmt: skip
    assert LARGEST_N in {request.body.get("n") for batch in rest for request in batch}
    for batch in warm_up_batches(ALL):
        for request in batch:
            assert not unknown_fields(request.path, request.body)


def test_warm_up_skips_features_that_a_model_lacks() -> None:
    plain = [r for batch in warm_up_batches(WarmUpFeatures(model="m", tasks=("generate",))) for r in batch]
    assert {request.path for request in plain} == {"/v1/completions"}
    assert not any("prompt_logprobs" in request.body for request in plain)
    assert [r.path for r in warm_up_batches(WarmUpFeatures(model="m", tasks=("embed", "score")))[0]] == [
        "/v1/embeddings",
        "/v1/score",
    ]


def test_a_request_that_never_ends_is_an_error_that_names_it() -> None:
    async def answer(request: HttpRequest) -> Response:
        body: Any = await request.json()
        if "seed" in body or "top_p" in body:
            await asyncio.Event().wait()
        return JSONResponse({})

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    features = WarmUpFeatures(model="m", tasks=("generate",))
    with pytest.raises(EngineError, match="had not ended after 0.5 s") as raised:
        asyncio.run(warm_up(app, features, timeout_s=0.5))
    assert '"seed":1' in str(raised.value) and "logit_bias" not in str(raised.value)


def test_refused_and_failed_warm_up_requests_are_returned(caplog: pytest.LogCaptureFixture) -> None:
    came: list[tuple[str, str | None]] = []

    async def answer(request: HttpRequest) -> Response:
        body: Any = await request.json()
        came.append((request.url.path, request.headers.get(RANK_HEADER)))
        if "seed" in body:
            raise RuntimeError("The test's own.")
        return JSONResponse({}, status_code=400 if "logit_bias" in body else 200)

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    features = WarmUpFeatures(model="m", tasks=("generate",), ranks=2)
    refused = asyncio.run(warm_up(app, features))
    assert sorted(answer.status for _, answer in refused) == [400, 400, 500, 500]
    assert len(came) == 2 * sum(map(len, warm_up_batches(features))) and {rank for _, rank in came} == {"0", "1"}
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "400" in caplog.text
