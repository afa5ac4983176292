"""Echo engine: a fake that answers with the prompt's words; starts at once, without torch or a model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from tandem.engine.echo import responses
from tandem.engine.protocol import AdapterRef, EngineStats
from tandem.engine.spec import EngineSpec
from tandem.engine.ttft import TtftWindow
from tandem.engine.usage import TokenCounts, current_tokens
from tandem.errors import ConfigError, EngineError, did_you_mean

TASKS = ("generate",)


MOST_TOKENS = 1_000_000
"""Of one answer, whatever a request asks for."""


class EchoEngine:
    """Answers completions and chats with the prompt's words, one for each token, `delay_s` apart; with `ignore_eos` it repeats
    them up to `max_tokens`.
    """

    def __init__(
        self,
        names: tuple[str, ...] = ("echo",),
        *,
        delay_s: float = 0.0,
        max_length: int = 1024,
        start_s: float = 0.0,
        slots: int = 0,
        tasks: tuple[str, ...] = TASKS,
    ) -> None:
        self._names = names
        self._delay_s = delay_s
        self._max_length = max_length
        self._start_s = start_s
        self._tasks = tasks
        self._adapters: dict[str, AdapterRef] = {}
        self._running = 0
        self._steps = 0
        self._waiting = 0
        self._slots = int(slots)
        unlimited = contextlib.nullcontext()
        self._slot_semaphore: contextlib.AbstractAsyncContextManager[Any] = (
            asyncio.Semaphore(self._slots) if slots else unlimited
        )
        self._first_tokens = TtftWindow()
        self._healthy = True
        self.aborted = 0
        """Requests whose client disconnected before the end."""
        self.loads: list[str] = []
        """Ids of the adapters that were loaded, in order."""
        self._app = Starlette(routes=self._routes())

    @classmethod
    def from_spec(cls, spec: EngineSpec) -> EchoEngine:
        """An echo under the spec's names; its arguments are delay_s, start_s, max_length and slots."""
        argument_names = ("delay_s", "start_s", "max_length", "slots")
        for key, value in spec.args.items():
            if key not in argument_names:
                raise ConfigError(
                    f"engine_args.{key} is not an argument of the echo engine.{did_you_mean(key, argument_names)}"
                )
            if not isinstance(value, int | float) or value < 0:
                raise ConfigError(f"engine_args.{key} is {value!r}; it must be a number, 0 or above.")
        return cls((spec.id, spec.name), **spec.args)

    @property
    def app(self) -> ASGIApp:
        """The engine's HTTP app."""
        return self._app

    async def start(self) -> None:
        """Ready after `start_s`."""
        await asyncio.sleep(self._start_s)

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Answer to one more name; a path that ends in `broken` cannot be loaded."""
        if adapter.path.endswith("broken"):
            raise EngineError(f"The adapter {adapter.id} at {adapter.path} cannot be loaded.")
        await asyncio.sleep(self._delay_s)
        self.loads.append(adapter.id)
        self._adapters[adapter.id] = adapter

    async def unload_adapter(self, adapter_id: str) -> None:
        """Remove an adapter."""
        self._adapters.pop(adapter_id, None)

    @property
    def healthy(self) -> bool:
        """Whether it answers."""
        return self._healthy

    def stats(self) -> EngineStats:
        """The load now."""
        return EngineStats(
            running=self._running,
            waiting=self._waiting,
            ttft_s=self._first_tokens.percentile_90(time.monotonic()),
            max_running=self._slots,
            adapters=tuple(self._adapters),
            tasks=self._tasks,
            steps=self._steps,
            healthy=self._healthy,
        )

    def die(self) -> None:
        """Behave like an engine whose process has ended."""
        self._healthy = False

    async def drain(self, timeout_s: float) -> None:
        """Wait for the answers being written."""
        deadline = time.monotonic() + timeout_s
        while (self._running or self._waiting) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def _list(self, request: Request) -> Response:
        names = [*self._names, *self._adapters]
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    def _routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/responses", self._respond, methods=["POST"]),
            Route("/v1/models", self._list),
            Route("/health", lambda request: PlainTextResponse("")),
        ]

    def _knows(self, model: str) -> bool:
        return model in self._names or model in self._adapters

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        return await self._answer(request, body, str(body.get("prompt", "")), chat=False)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        prompt = " ".join(str(message.get("content", "")) for message in body.get("messages", []))
        return await self._answer(request, body, prompt, chat=True)

    async def _answer(self, request: Request, body: dict[str, Any], prompt: str, *, chat: bool) -> Response:
        model = str(body.get("model"))
        if not self._knows(model):
            return _unknown(model)
        words = prompt.split()
        if len(words) > self._max_length:
            return _error(400, f"The prompt has {len(words)} tokens; the model takes {self._max_length}.", None)
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or len(words)
        answer_words = itertools.islice(
            itertools.cycle(words) if body.get("ignore_eos") else words, min(int(limit), MOST_TOKENS)
        )
        tokens = _Tokens(word if index == 0 else f" {word}" for index, word in enumerate(answer_words))
        if not self._healthy:
            return _error(500, "The engine is dead.", None)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": ("chat.completion" if chat else "text_completion")
            + (".chunk" if chat and body.get("stream") else ""),
            "created": int(time.time()),
            "model": model,
        }
        if (counters := current_tokens()) is not None:
            counters.add(
                str(head["id"]), lambda: TokenCounts(len(words) if tokens.num_generated else 0, tokens.num_generated)
            )
        usage = {
            "prompt_tokens": len(words),
            "completion_tokens": len(tokens),
            "total_tokens": len(words) + len(tokens),
        }
        if body.get("stream"):
            options = body.get("stream_options") or {}
            stream = self._stream(head, tokens, usage if options.get("include_usage") else None, chat=chat)
            return StreamingResponse(stream, media_type="text/event-stream")
        async with self._running_request():
            for _ in tokens:
                if self._delay_s and await request.is_disconnected():
                    self.aborted += 1
                    return Response(status_code=499)
                await asyncio.sleep(self._delay_s)
                self._steps += 1
        text = "".join(list.__iter__(tokens))
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse({**head, "choices": [choice], "usage": usage})

    async def _respond(self, request: Request) -> Response:
        body = await request.json()
        model = str(body.get("model"))
        if not self._knows(model):
            return _unknown(model)
        words = responses.prompt_of(body).split()
        if len(words) > self._max_length:
            return _error(400, f"The prompt has {len(words)} tokens; the model takes {self._max_length}.", None)
        limit = min(int(body.get("max_output_tokens") or len(words)), MOST_TOKENS)
        tokens = _Tokens(word if index == 0 else f" {word}" for index, word in enumerate(words[:limit]))
        head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()), "model": model}
        if (counters := current_tokens()) is not None:
            counters.add(
                str(head["id"]), lambda: TokenCounts(len(words) if tokens.num_generated else 0, tokens.num_generated)
            )
        text = "".join(list.__iter__(tokens))
        total = len(words) + len(tokens)
        usage = {"prompt_tokens": len(words), "completion_tokens": len(tokens), "total_tokens": total}
        whole = responses.response(head, body, text, usage)
        if body.get("stream"):
            return StreamingResponse(self._stream_response(whole, tokens), media_type="text/event-stream")
        async with self._running_request():
            for _ in tokens:
                await asyncio.sleep(self._delay_s)
                self._steps += 1
        return JSONResponse(whole)

    async def _stream_response(self, whole: dict[str, Any], tokens: list[str]) -> AsyncIterator[bytes]:
        complete = False
        try:
            async with self._running_request():
                for event in responses.first_events(whole):
                    yield _named_event(event)
                for number, token in enumerate(tokens, 2):
                    await asyncio.sleep(self._delay_s)
                    self._steps += 1
                    yield _named_event(responses.delta_event(whole, token, number))
                yield _named_event(responses.last_event(whole, len(tokens) + 2))
                complete = True
        finally:
            self.aborted += not complete

    async def _stream(
        self, head: dict[str, Any], tokens: list[str], usage: dict[str, int] | None, *, chat: bool
    ) -> AsyncIterator[bytes]:
        arrived_at, complete = time.monotonic(), False
        try:
            async with self._running_request():
                for index, token in enumerate(tokens):
                    await asyncio.sleep(self._delay_s)
                    self._steps += 1
                    if index == 0:
                        self._first_tokens.add((time.monotonic() - arrived_at,), time.monotonic())
                    finish = "stop" if index + 1 == len(tokens) else None
                    content: dict[str, Any] = (
                        {"delta": {"role": "assistant", "content": token}} if chat else {"text": token}
                    )
                    choice = {"index": 0, "finish_reason": finish, "logprobs": None, **content}
                    yield _event({**head, "choices": [choice]})
                if usage is not None:
                    yield _event({**head, "choices": [], "usage": usage})
                yield b"data: [DONE]\n\n"
                complete = True
        finally:
            self.aborted += not complete

    @contextlib.asynccontextmanager
    async def _running_request(self) -> AsyncIterator[None]:
        """Wait for a free slot if slots are limited, and count as running for the length of a block."""
        self._waiting += 1
        is_waiting = True
        try:
            async with self._slot_semaphore:
                self._waiting -= 1
                is_waiting = False
                self._running += 1
                try:
                    yield
                finally:
                    self._running -= 1
        finally:
            self._waiting -= is_waiting


class _Tokens(list[str]):
    """Tokens of an answer; `num_generated` of them have been generated by a loop over them."""

    num_generated = 0

    def __iter__(self) -> Iterator[str]:
        for token in super().__iter__():
            yield token
            self.num_generated += 1


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _named_event(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\n".encode() + _event(value)


def _unknown(model: str) -> Response:
    return _error(404, f"The model `{model}` does not exist.", "model_not_found")


def _error(status: int, message: str, code: str | None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)
