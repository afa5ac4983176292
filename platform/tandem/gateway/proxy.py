"""Copies bytes between a client and an engine replica; nothing of a token is ever a Python object here.

A client that leaves closes the engine's connection, streaming or not, and that is how vLLM learns to abort. A request that
no byte was answered to may be tried once more on another replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import aiohttp
from pydantic_core import from_json, to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.config.serve import GatewayConfig
from tandem.gateway.catalog import Target
from tandem.gateway.dialect import BROKEN, Dialect, amended
from tandem.gateway.errors import from_engine, no_replica, request_id
from tandem.gateway.fleet import Fleet
from tandem.gateway.latency import HEADER, Record, Stopwatch, TimedBody, forget, header
from tandem.serve.ask import Ask
from tandem.serve.records import TOKEN_HEADER, UNAVAILABLE_HEADER, adapter_headers

ATTEMPTS = 2
PASSED_ON = ("content-type", "x-request-id", "cache-control", "metadata")
"""Response headers of an engine that a client gets; `metadata` tells what raw bytes of embeddings are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request as an engine is to get it."""

    path: str
    body: bytes
    target: Target
    headers: Mapping[str, str]
    dialect: Dialect
    ask: Ask
    """The same for the router."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Started when the request's last byte came in."""

    def body_for(self, base: str) -> bytes:
        """The body for a replica of `base`: while a model changes, that may be another version than was meant."""
        return self.body if base == self.ask.base else to_json({**from_json(self.body), "model": base})


class Proxy:
    """The gateway's connections to all engines."""

    def __init__(self, fleet: Fleet, config: GatewayConfig, record: Record = forget) -> None:
        self.record = record
        self._fleet = fleet
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Open the connection pool; needs the running loop."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._config.connect_timeout_s, sock_read=self._config.request_timeout_s
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def stop(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    def has(self, target: Target) -> bool:
        """Whether a replica of just this target is ready."""
        return target.pool in self._fleet.ready_bases()

    def forward(self, call: Call) -> Response:
        """The response that carries a call to a replica of its target when Starlette sends it."""
        return _Forwarded(self, call)

    async def open(self, call: Call, held: contextlib.AsyncExitStack) -> aiohttp.ClientResponse:
        """Send the call and wait for the head of the answer; `held` keeps the connection and the count.

        Raises ApiError 503 with Retry-After if no replica takes it.
        """
        if self._session is None:
            raise RuntimeError("Proxy.start was not called.")
        target, adapter = call.target, call.target.adapter
        sent = {"content-type": "application/json", **call.headers, **(adapter_headers(adapter) if adapter else {})}
        avoid: list[str] = []
        reason = f"No replica of {target.base.name} is ready"
        for _ in range(ATTEMPTS):
            replica = self._fleet.choose(call.ask, avoid)
            if replica is None:
                break
            avoid.append(replica.id)
            attempt = contextlib.AsyncExitStack()
            try:
                attempt.enter_context(self._fleet.counting(call.ask, replica))
                request = self._session.post(
                    replica.url + call.path,
                    data=TimedBody(call.body_for(replica.base), call.watch),
                    headers={**sent, TOKEN_HEADER: replica.token},
                )
                answer = await attempt.enter_async_context(request)
                call.watch.answered = time.perf_counter()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                await attempt.aclose()
                self._fleet.suspect(replica)
                reason = f"A replica of {target.base.name} did not answer ({type(error).__name__})"
                continue
            except BaseException:
                await attempt.aclose()
                raise
            if answer.status == 503 and UNAVAILABLE_HEADER in answer.headers:
                reason = f"{target.base.name}: {await _said(answer)}"
                if answer.headers[UNAVAILABLE_HEADER] != "adapters":
                    self._fleet.suspect(replica)
                await attempt.aclose()
                continue
            if answer.status == 200:
                self._fleet.answered(call.ask, replica)
            held.push_async_exit(attempt)
            return answer
        raise no_replica(
            f"{reason.rstrip('.')}. Try again in {self._config.retry_after_s} s.", self._config.retry_after_s
        )


class _Forwarded(Response):
    """A request on its way to an engine and back."""

    def __init__(self, proxy: Proxy, call: Call) -> None:
        self._proxy = proxy
        self._call = call
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Copy until the engine is done or the client has left, whichever comes first."""
        copying = asyncio.ensure_future(self._copy(scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((copying, leaving), return_when=asyncio.FIRST_COMPLETED)
            if copying.done():
                copying.result()
        finally:
            # Also when Serve cancels us: whatever ends this request closes the engine's connection.
            leaving.cancel()
            copying.cancel()
            with contextlib.suppress(BaseException):
                await copying

    async def _copy(self, scope: Scope, receive: Receive, send: Send) -> None:
        call, dialect, request = self._call, self._call.dialect, request_id(scope)
        async with contextlib.AsyncExitStack() as held:
            answer = await self._proxy.open(call, held)
            if answer.status >= 400:
                error = from_engine(answer.status, await answer.read(), call.target.base.max_length)
                await error.response(dialect, request)(scope, receive, send)
                return
            head = [
                (name.encode(), answer.headers[name].encode("latin-1")) for name in PASSED_ON if name in answer.headers
            ]
            gateway_ms, engine_ms = call.watch.split_ms()
            head.append((HEADER, header(gateway_ms, engine_ms)))
            await _send_head(send, answer.status, head, answer.content_length)
            self._proxy.record(call.path, gateway_ms)
            streamed = answer.content_type.startswith("text/event-stream")
            last = b""
            try:
                async for chunk in answer.content.iter_any():
                    last = amended(chunk, dialect, request) if streamed else chunk
                    await send({"type": "http.response.body", "body": last, "more_body": True})
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                # Too late for a status. A stream can still say why it ends; anything else must look cut off.
                if not streamed:
                    raise
                text = f"{BROKEN} ({type(error).__name__})."
                event = dialect.event(502, text, code="engine_unavailable", request=request, last=last)
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def _send_head(send: Send, status: int, headers: list[tuple[bytes, bytes]], length: int | None) -> None:
    if length is not None:
        headers = [*headers, (b"content-length", str(length).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _said(answer: aiohttp.ClientResponse) -> str:
    try:
        return str((await answer.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, aiohttp.ClientError):
        return "not available"
