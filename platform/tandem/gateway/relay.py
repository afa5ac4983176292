"""Copies bytes between a client and an engine replica; nothing of a token is ever a Python object here.

A client that leaves closes the engine's connection, streaming or not, and that is how vLLM learns to abort; so does one that
takes nothing of its answer for a while, and so does a deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable

import aiohttp
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tandem.gateway.dialect import BROKEN, rewrite_errors
from tandem.gateway.errors import NoReplica, from_engine, request_id
from tandem.gateway.latency import HEADER, header
from tandem.gateway.upstream import ATTEMPTS, EngineRequest, StartedResponse, Upstream

REPLICA, GATEWAY = b"x-tandem-replica", b"x-tandem-gateway"
"""Headers of an answer: the ids of the replica that gave it, and of the gateway that carried it."""
PASSED_ON = ("content-type", "x-request-id", "cache-control", "metadata")
"""Response headers of an engine that a client gets; `metadata` tells what raw bytes of embeddings are."""
Prepare = Callable[[EngineRequest], Awaitable[EngineRequest]]
"""What is done with a call when its turn has come, before it is sent."""


class RelayedResponse(Response):
    """The response that carries a call to a replica, when Starlette sends it and its turn has come, and the answer back."""

    def __init__(self, upstream: Upstream, call: EngineRequest, prepare: Prepare | None = None) -> None:
        self.background = None
        self.sending_since = math.inf
        """When the client was given what it has not taken yet."""
        self._upstream = upstream
        self._call = call
        self._prepare = prepare
        self._slot = upstream.admission.slot(call.model.base, call.hints, light=call.light)
        self._copying: asyncio.Task[None] | None = None
        self._stalled = False
        self._streamed: bool | None = None
        """Whether events are sent; None: not even a head was."""
        self._last = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Copy until the engine is done, the client has left, or the time is over, whichever comes first."""
        finish_by = self._call.hints.finish_by
        left_s = None if finish_by == math.inf else max(0.0, finish_by - time.monotonic())
        copying = self._copying = asyncio.ensure_future(self._copy(scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        self._upstream.under_way.add(self)
        try:
            await asyncio.wait((copying, leaving), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if self._stalled:
                raise ConnectionAbortedError("The client took nothing of its answer and was cut off.")
            if copying.done():
                copying.result()
            elif not leaving.done():
                await _ended(copying)
                if copying.cancelled():
                    await self._say_expired(scope, send)
                else:  # it ended in the very moment
                    copying.result()
        finally:
            # Also when Serve cancels us: whatever ends this request closes the engine's connection.
            self._upstream.under_way.discard(self)
            leaving.cancel()
            await _ended(copying)

    def cut(self) -> None:
        """End it: nobody takes what is sent."""
        if self._copying is not None:
            self._stalled = True
            self._copying.cancel()

    async def _say_expired(self, scope: Scope, send: Send) -> None:
        error = self._slot.deadline_error()
        if self._streamed is None:
            raise error
        if not self._streamed:
            raise TimeoutError(error.message)
        # A client that takes nothing cannot be told either.
        async with asyncio.timeout(1.0):
            await self._say(send, error.status, error.message, error.code, request_id(scope))
            await send({"type": "http.response.body", "body": b""})

    async def _say(self, send: Send, status: int, message: str, code: str | None, request: str) -> None:
        event = self._call.dialect.event(status, message, code=code, request=request, last=self._last)
        await send({"type": "http.response.body", "body": event, "more_body": True})

    def _watched(self, send: Send) -> Send:
        """The same, for what there is one of in an answer; the loop over its chunks keeps the time itself."""

        async def send_and_note(message: Message) -> None:
            self.sending_since = time.monotonic()
            await send(message)
            self.sending_since = math.inf

        return send_and_note

    async def _opened(self, held: contextlib.AsyncExitStack) -> StartedResponse:
        """The beginning of the answer, once the call's turn has come; `held` keeps its place among those in flight."""
        call = self._call
        held.callback(self._slot.release)
        # Waiting for its turn is not the gateway's work.
        call.watch.received += await self._slot.acquire()
        if self._prepare is not None:
            call = await self._prepare(call)
        started = call.started
        while True:
            try:
                return await self._upstream.open(call, held, started)
            except NoReplica as reason:
                started = reason.started
                if started >= ATTEMPTS:
                    raise
                call.watch.received += await self._slot.reacquire(reason)

    async def _copy(self, scope: Scope, receive: Receive, send: Send) -> None:
        call, dialect, request = self._call, self._call.dialect, request_id(scope)
        # A server holds each message back until the client has taken of those before it: the last ones too.
        once = self._watched(send)
        async with contextlib.AsyncExitStack() as held:
            answer, chunk, replica = await self._opened(held)
            if answer.status >= 400:
                error = from_engine(
                    answer.status, await answer.read(), call.model.base.max_length, call.model.base.name
                )
                error.headers |= call.warnings
                await error.response(dialect, request)(scope, receive, once)
                return
            head = [
                (name.encode(), answer.headers[name].encode("latin-1")) for name in PASSED_ON if name in answer.headers
            ]
            gateway_ms, engine_ms = call.watch.split_ms()
            head += [
                (HEADER, header(gateway_ms, engine_ms)),
                (REPLICA, replica.id.encode()),
                (GATEWAY, self._upstream.name),
            ]
            head += [(name.encode(), value.encode()) for name, value in call.warnings.items()]
            self._streamed = streamed = answer.content_type.startswith("text/event-stream")
            await _send_head(once, answer.status, head, answer.content_length)
            self._upstream.record_latency(call.path, gateway_ms)
            try:
                while chunk:
                    self._last = rewrite_errors(chunk, dialect, request) if streamed else chunk
                    self.sending_since = time.monotonic()
                    await send({"type": "http.response.body", "body": self._last, "more_body": True})
                    self.sending_since = math.inf
                    chunk = await answer.content.readany()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                # Too late for a status. A stream can still say why it ends; anything else must look cut off.
                if not streamed:
                    raise
                await self._say(once, 502, f"{BROKEN} ({type(error).__name__}).", "engine_unavailable", request)
            else:
                self._slot.complete = answer.status == 200
            await once({"type": "http.response.body", "body": b""})


async def _send_head(send: Send, status: int, headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    if length is not None:
        headers = [*headers, (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _ended(copying: asyncio.Task[None]) -> None:
    copying.cancel()
    with contextlib.suppress(BaseException):
        await copying


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
