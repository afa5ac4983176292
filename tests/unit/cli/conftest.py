"""A small server that speaks the OpenAI stream format, on a real port; what it answers depends on the question."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

KEY = "right-key"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error in OpenAI's shape."""
    return JSONResponse({"error": {"message": message, "code": status}}, status_code=status, headers=headers)


@dataclass
class OpenAiServer:
    """Serves `models`, and answers with the last message's words; some questions make it misbehave."""

    models: list[str] = field(default_factory=lambda: ["base", "helper"])
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the chat requests."""
    aborted: threading.Event = field(default_factory=threading.Event)
    """Set when a client left before its answer was done."""

    def __post_init__(self) -> None:
        app = Starlette(
            routes=[Route("/v1/models", self.list_models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        )
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, lifespan="off", log_config=None))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> OpenAiServer:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return refusal(401, "Incorrect API key provided")
        return JSONResponse({"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return refusal(401, "Incorrect API key provided")
        body = await request.json()
        self.requests.append(body)
        if body["model"] not in self.models:
            return refusal(404, f"The model `{body['model']}` does not exist.")
        match body["messages"][-1]["content"]:
            case "too long":
                return refusal(400, "The prompt has 900 tokens; the model takes 512")
            case "busy and says when":
                return refusal(503, "No replica is ready. Try again in 5 s.", {"retry-after": "0"})
            case "busy":
                return refusal(503, "No replica is ready", {"retry-after": "0"})
            case "crash":
                return Response("not JSON at all", status_code=500)
        return StreamingResponse(self.stream(request, body), media_type="text/event-stream")

    async def stream(self, request: Request, body: dict[str, Any]) -> AsyncIterator[str]:
        """The events of an answer."""
        question = body["messages"][-1]["content"]
        words = [f"{word} " for word in f"{body['model']} heard {question}".split()]
        if question == "slow":
            words = ["one "] * 2000
        if question == "nothing":
            words = []
        try:
            for word in words:
                if question == "slow":
                    await asyncio.sleep(0.05)
                yield event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]})
        except asyncio.CancelledError:
            self.aborted.set()
            raise
        if question == "break":
            raise ConnectionResetError
        if question == "fail":
            yield event({"error": {"message": "The engine died", "code": 500}})
            return
        reason = "length" if question == "cut" else "stop"
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        yield event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}})
        yield "data: [DONE]\n\n"


def event(fields: dict[str, Any]) -> str:
    """One server-sent event."""
    return (
        f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'created': 0, 'model': 'm', **fields})}\n\n"
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAiServer]:
    """A running server, which the settings point at."""
    with OpenAiServer() as running:
        monkeypatch.setenv("TANDEM_API_URL", running.url)
        monkeypatch.setenv("TANDEM_API_KEY", KEY)
        yield running
