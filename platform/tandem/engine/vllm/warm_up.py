"""Warm-up of an engine: requests that make it compile and load before it is ready (docs/adr/0022).

They go through the engine's own app, as those of clients do: vLLM compiles its samplers, the tokenizer's table for grammars and
the chat template at the first request that needs them, on a CPU and on a GPU alike. Pure but for `warm_up`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json
from starlette.types import ASGIApp

from tandem.engine.asgi import Answer, post
from tandem.errors import EngineError

log = logging.getLogger(__name__)

ANSWER_TOKENS = 2
"""Length of each answer: the first token comes from the prompt's step, the second from a step of its own."""
LARGEST_N = 8
"""`n` of the largest request: from 8 sequences on vLLM takes other kernels for top-k and top-p on a GPU."""
RANK_HEADER = "X-data-parallel-rank"
"""Header that selects one of the engines that share the work; each compiles for itself."""
WARM_UP_TIMEOUT_S = 600.0
"""Seconds for all requests: 20 times what they take on 2 cores with nothing compiled. Only an engine that hangs needs more."""
ANSWER_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 4}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUpFeatures:
    """Features of an engine that its warm-up depends on."""

    model: str
    """A name that the engine answers to."""
    tasks: tuple[str, ...]
    """generate, embed, score and others, in vLLM's words."""
    chat: bool = False
    """Whether it has a chat template."""
    tools: bool = False
    """Whether it takes tools."""
    prompt_logprobs: bool = False
    """Whether it has logprobs of prompts."""
    ranks: int = 1
    """Engines that share the work (vLLM's data parallelism)."""


@dataclass(frozen=True, slots=True)
class Request:
    """A POST of JSON."""

    path: str
    body: dict[str, Any]

    def describe(self) -> str:
        """The path, and the fields that distinguish this request in at most 200 characters of JSON."""
        common_fields = ("model", "prompt", "messages", "input")
        distinct_fields = {key: value for key, value in self.body.items() if key not in common_fields}
        return f"{self.path} {to_json(distinct_fields).decode()[:200]}"


def warm_up_batches(features: WarmUpFeatures) -> list[list[Request]]:
    """The requests: those of one list are sent together, the lists one after another.

    The first sampled request is alone, since PyTorch compiles a batch of one apart from larger ones. The others share batches, so
    that a large model needs few steps for all of them.
    """
    if "generate" not in features.tasks:
        return [pooling(features)]
    completion = {"model": features.model, "prompt": "a b c", "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
    single_request = Request("/v1/completions", completion | {"temperature": 1.0})
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 5},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"seed": 1},
        {"logprobs": 2},
        {"logprobs": 2, "temperature": 0.0},
        {"n": LARGEST_N, "top_k": 5, "top_p": 0.9},
        {"logit_bias": {"1": -1.0}},
        {"bad_words": ["a"]},
        {"min_tokens": 1, "stop": ["\n"]},
    ]
    if features.prompt_logprobs:
        settings.append({"prompt_logprobs": 1})
    mixed_batch = [Request("/v1/completions", completion | setting) for setting in settings]
    # A batch that holds nothing but its kind takes branches that a mixed one does not.
    batches = [[Request("/v1/completions", completion | {"n": LARGEST_N, "temperature": 1.0})]]
    if not features.chat:
        return [[single_request], *batches, mixed_batch]
    return [[single_request], *batches, [*mixed_batch, *chats(features)]]


def chats(features: WarmUpFeatures) -> list[Request]:
    """Requests to each API of conversations, and requests with grammars."""
    messages = [{"role": "user", "content": "a b c"}]
    chat = {"model": features.model, "messages": messages, "max_tokens": ANSWER_TOKENS}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": ANSWER_SCHEMA}}
    requests = [
        Request("/v1/chat/completions", chat | {"logprobs": True, "top_logprobs": 2}),
        Request("/v1/chat/completions", chat | {"stream": True}),
        Request("/v1/chat/completions", chat | {"response_format": schema}),
        Request("/v1/chat/completions", chat | {"structured_outputs": {"regex": "[ab]+"}}),
        Request("/v1/messages", chat),
        Request(
            "/v1/responses",
            {"model": features.model, "input": messages, "max_output_tokens": ANSWER_TOKENS, "store": False},
        ),
    ]
    if features.tools:
        function = {"name": "a", "description": "b", "parameters": ANSWER_SCHEMA}
        tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
        requests.append(Request("/v1/chat/completions", chat | tools))
    return requests


def pooling(features: WarmUpFeatures) -> list[Request]:
    """Requests to an embedding or scoring model."""
    requests = []
    if "embed" in features.tasks:
        requests.append(Request("/v1/embeddings", {"model": features.model, "input": "a b c"}))
    if "score" in features.tasks:
        requests.append(Request("/v1/score", {"model": features.model, "text_1": "a", "text_2": "b"}))
    return requests


async def warm_up(
    app: ASGIApp, features: WarmUpFeatures, timeout_s: float = WARM_UP_TIMEOUT_S
) -> list[tuple[Request, Answer]]:
    """Send the requests; log and return those that the engine refused, with its answers.

    A refusal stops nothing: a model may lack what is asked. An engine that dies of a request says so by its health. Raises
    EngineError with the requests that have not ended if they take more than `timeout_s` seconds together.
    """
    refused: list[tuple[Request, Answer]] = []
    unanswered: list[Request] = []
    try:
        async with asyncio.timeout(timeout_s):
            for rank in range(features.ranks):
                headers = {RANK_HEADER: str(rank)} if features.ranks > 1 else {}
                for batch in warm_up_batches(features):
                    unanswered += batch
                    answers = await asyncio.gather(*(_ask(app, request, headers, unanswered) for request in batch))
                    refused += [refusal for refusal in zip(batch, answers, strict=True) if refusal[1].status != 200]
    except TimeoutError as error:
        descriptions = "; ".join(request.describe() for request in unanswered)
        raise EngineError(
            f"{features.model}: {len(unanswered)} warm-up requests had not ended after {timeout_s:g} s: {descriptions}. "
            "See the engine's log; try fewer engine_args, or a smaller model."
        ) from error
    if refused:
        log.warning("%s refused requests of its warm-up: %s", features.model, refusals(refused))
    return refused


async def _ask(app: ASGIApp, request: Request, headers: dict[str, str], unanswered: list[Request]) -> Answer:
    try:
        answer = await post(app, request.path, to_json(request.body), headers)
    except Exception as error:  # noqa: BLE001 - an app raises again what it has answered with 500
        answer = Answer(500, f"{type(error).__name__}: {error}".encode())
    # Not in a `finally`: a request that is cancelled has no answer.
    unanswered.remove(request)
    return answer


def refusals(refused: Sequence[tuple[Request, Answer]]) -> str:
    """Refused requests and their answers, for a log."""
    # Requests that fail for one reason fail with one answer.
    paths_by_error: dict[str, list[str]] = {}
    for request, answer in refused:
        error = f"{answer.status}: {answer.body[:200].decode(errors='replace')}"
        paths_by_error.setdefault(error, []).append(request.path)
    return "; ".join(
        f"{len(request_paths)} x {', '.join(sorted(set(request_paths)))} {error}"
        for error, request_paths in paths_by_error.items()
    )
