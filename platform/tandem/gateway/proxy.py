"""Copies bytes between a client and an engine replica; nothing of a token is ever a Python object here.

A client that leaves closes the engine's connection, streaming or not, and that is how vLLM learns to abort; so does one that
takes nothing of its answer for a while, and so does a deadline. A request that no byte was answered to may be tried once more
on another replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import aiohttp
from pydantic_core import from_json, to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.config.serve import GatewayConfig
from tandem.gateway.admission import Admission
from tandem.gateway.catalog import Target
from tandem.gateway.dialect import BROKEN, Dialect, amended
from tandem.gateway.errors import NoReplica, from_engine, no_replica, request_id
from tandem.gateway.fleet import Fleet
from tandem.gateway.latency import HEADER, Record, Stopwatch, TimedBody, forget, header
from tandem.gateway.links import Links
from tandem.gateway.queue import Wish
from tandem.serve.ask import Ask
from tandem.serve.records import TOKEN_HEADER, UNAVAILABLE_HEADER, ReplicaRecord, adapter_headers

ATTEMPTS = 2
REPLICA = b"x-tandem-replica"
"""Header of an answer: the id of the replica that gave it."""
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
    wish: Wish
    """How urgent it is."""
    light: bool = False
    """Whether it needs no place in a queue."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Started when the request's last byte came in."""

    def body_for(self, base: str) -> bytes:
        """The body for a replica of `base`: while a model changes, that may be another version than was meant."""
        return self.body if base == self.ask.base else to_json({**from_json(self.body), "model": base})


Prepare = Callable[[Call], Awaitable[Call]]
"""What is done with a call when its turn has come, before it is sent."""


class Opened(NamedTuple):
    """An answer that has begun."""

    answer: aiohttp.ClientResponse
    first: bytes
    """The first of its bytes; those that follow are still to be read. An error's are all still to be read."""
    replica: ReplicaRecord
    """Who gives it."""


class Proxy:
    """The gateway's connections to all engines."""

    def __init__(self, fleet: Fleet, admission: Admission, config: GatewayConfig, record: Record = forget) -> None:
        self.admission = admission
        self.record = record
        self.under_way: set[_Forwarded] = set()
        """Answers that are being sent."""
        self._fleet = fleet
        self._watching: asyncio.Task[None] | None = None
        self._config = config
        self._session: aiohttp.ClientSession | None = None
        self._links: Links | None = None
        fleet.on_lost = self._cut

    def start(self) -> None:
        """Open the connection pool; needs the running loop."""
        self._links = Links()
        self._session = aiohttp.ClientSession(
            connector=self._links,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._config.connect_timeout_s, sock_read=self._config.request_timeout_s
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._watching = asyncio.create_task(self._cut_stalled())

    async def stop(self) -> None:
        """Close all connections."""
        if self._watching is not None:
            self._watching.cancel()
        if self._session is not None:
            await self._session.close()

    def _cut(self, replica: ReplicaRecord) -> None:
        # What waits for a lost replica would wait for ever: so it is tried elsewhere, or ends with an error.
        if self._links is not None:
            self._links.cut(replica.url)

    def has(self, target: Target) -> bool:
        """Whether a replica of just this target is ready."""
        return self._fleet.has(target.pool)

    def forward(self, call: Call, prepare: Prepare | None = None) -> Response:
        """The response that carries a call to a replica of its target when Starlette sends it, and its turn has come."""
        return _Forwarded(self, call, prepare)

    async def open(self, call: Call, held: contextlib.AsyncExitStack, begun: int = 0) -> Opened:
        """Send the call and wait until the answer has begun; `held` keeps the connection and the count.

        It has begun with the first byte of its body: an engine sends the head of a stream long before, and may still die.
        `begun`: how many replicas may have begun with the call before. Raises NoReplica, with how many there are now, if none
        takes it.
        """
        if self._session is None:
            raise RuntimeError("Proxy.start was not called.")
        target, adapter = call.target, call.target.adapter
        sent = {"content-type": "application/json", **call.headers, **(adapter_headers(adapter) if adapter else {})}
        avoid: list[str] = []
        reason = f"No replica of {target.base.name} is ready"
        while begun < ATTEMPTS and len(avoid) < ATTEMPTS:
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
                first = await answer.content.readany() if answer.status == 200 else b""
                call.watch.answered = time.perf_counter()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                await attempt.aclose()
                self._fleet.suspect(replica)
                begun += not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
                reason = f"A replica of {target.base.name} did not answer ({type(error).__name__})"
                continue
            except BaseException:
                await attempt.aclose()
                raise
            if answer.status == 503 and UNAVAILABLE_HEADER in answer.headers:
                reason = f"{target.base.name}: {await _said(answer)}"
                if answer.headers[UNAVAILABLE_HEADER] != "adapters":
                    self._fleet.suspect(replica)
                else:
                    begun = ATTEMPTS  # it has waited there already
                await attempt.aclose()
                continue
            if answer.status == 200:
                self._fleet.answered(call.ask, replica)
            held.push_async_exit(attempt)
            return Opened(answer, first, replica)
        refusal = no_replica(reason, self._config.retry_after_s)
        refusal.begun = begun
        raise refusal

    async def _cut_stalled(self) -> None:
        """End the answers of clients that take nothing of them."""
        while True:
            await asyncio.sleep(self._config.client_stall_s / 4)
            limit = time.monotonic() - self._config.client_stall_s
            for forwarded in [each for each in self.under_way if each.sending_since < limit]:
                forwarded.cut()


class _Forwarded(Response):
    """A request on its way to an engine and back."""

    def __init__(self, proxy: Proxy, call: Call, prepare: Prepare | None) -> None:
        self.background = None
        self.sending_since = math.inf
        """When the client was given what it has not taken yet."""
        self._proxy = proxy
        self._call = call
        self._prepare = prepare
        self._place = proxy.admission.place(call.target.base, call.wish, light=call.light)
        self._copying: asyncio.Task[None] | None = None
        self._stalled = False
        self._streamed: bool | None = None
        """Whether events are sent; None: not even a head was."""
        self._last = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Copy until the engine is done, the client has left, or the time is over, whichever comes first."""
        finish_by = self._call.wish.finish_by
        left_s = None if finish_by == math.inf else max(0.0, finish_by - time.monotonic())
        copying = self._copying = asyncio.ensure_future(self._copy(scope, receive, send))
        leaving = asyncio.ensure_future(_left(receive))
        self._proxy.under_way.add(self)
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
            self._proxy.under_way.discard(self)
            leaving.cancel()
            await _ended(copying)

    def cut(self) -> None:
        """End it: nobody takes what is sent."""
        if self._copying is not None:
            self._stalled = True
            self._copying.cancel()

    async def _say_expired(self, scope: Scope, send: Send) -> None:
        error = self._place.late()
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

    async def _opened(self, held: contextlib.AsyncExitStack) -> Opened:
        """The beginning of the answer, once the call's turn has come; `held` keeps its place among those in flight."""
        call, begun = self._call, 0
        held.callback(self._place.leave)
        # Waiting for its turn is not the gateway's work.
        call.watch.received += await self._place.take()
        if self._prepare is not None:
            call = await self._prepare(call)
        while True:
            try:
                return await self._proxy.open(call, held, begun)
            except NoReplica as reason:
                begun = reason.begun
                if begun >= ATTEMPTS:
                    raise
                call.watch.received += await self._place.take_again(reason)

    async def _copy(self, scope: Scope, receive: Receive, send: Send) -> None:
        call, dialect, request = self._call, self._call.dialect, request_id(scope)
        async with contextlib.AsyncExitStack() as held:
            answer, chunk, replica = await self._opened(held)
            if answer.status >= 400:
                error = from_engine(answer.status, await answer.read(), call.target.base.max_length)
                await error.response(dialect, request)(scope, receive, send)
                return
            head = [
                (name.encode(), answer.headers[name].encode("latin-1")) for name in PASSED_ON if name in answer.headers
            ]
            gateway_ms, engine_ms = call.watch.split_ms()
            head += [(HEADER, header(gateway_ms, engine_ms)), (REPLICA, replica.id.encode())]
            self._streamed = streamed = answer.content_type.startswith("text/event-stream")
            await _send_head(send, answer.status, head, answer.content_length)
            self._proxy.record(call.path, gateway_ms)
            try:
                while chunk:
                    self._last = amended(chunk, dialect, request) if streamed else chunk
                    self.sending_since = time.monotonic()
                    await send({"type": "http.response.body", "body": self._last, "more_body": True})
                    self.sending_since = math.inf
                    chunk = await answer.content.readany()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                # Too late for a status. A stream can still say why it ends; anything else must look cut off.
                if not streamed:
                    raise
                await self._say(send, 502, f"{BROKEN} ({type(error).__name__}).", "engine_unavailable", request)
            else:
                self._place.whole = answer.status == 200
            await send({"type": "http.response.body", "body": b""})


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


async def _said(answer: aiohttp.ClientResponse) -> str:
    try:
        return str((await answer.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, aiohttp.ClientError):
        return "not available"
