"""Connections to engine replicas: one connection pool, and one POST for each attempt at one replica.

An attempt ends with the first bytes of an answer, or with the reason why there is none and whether the replica may have begun
with the request. Which replica is tried, and how often, is decided in `relay`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import HttpProcessingError
from pydantic_core import from_json, to_json

from tandem.cluster.keepalive import keep_alive
from tandem.config.serving.app import GatewayConfig
from tandem.gateway.admission.queue import SchedulingHints
from tandem.gateway.dialect import Dialect
from tandem.gateway.errors import too_slow, unreadable
from tandem.gateway.latency import Stopwatch
from tandem.gateway.models.catalog import ResolvedModel
from tandem.routing.records import ALIVE_PATH, TOKEN_HEADER, UNAVAILABLE_HEADER, ReplicaRecord, adapter_headers
from tandem.routing.request import RoutingRequest
from tandem.usage.records import UsageLabels
from tandem.usage.wire import LABELS_HEADER

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

KEEP_ALIVE_S = 30.0
"""Seconds for which an idle connection to a replica is kept."""
UNREACHABLE_S = 15
"""Seconds after which a connection to a replica whose machine acknowledges nothing has ended, streams on it too."""
PIECE_BYTES = 64 * 1024
"""Bytes of a body that are written at once."""
MAX_HEADER_BYTES = 1 << 20
"""Longest header of an engine's answer: `metadata` of embeddings describes each input by about 110 bytes."""
NOT_COMPLETED = "Response payload is not completed"
"""Start of aiohttp's message for a body during which the connection was lost."""
ALIVE_TIMEOUT_S = 3.0
"""Seconds that a replica has to answer whether it is alive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """A client's request in the form in which an engine gets it."""

    path: str
    body: bytes
    model: ResolvedModel
    headers: Mapping[str, str]
    """Headers for the engine."""
    dialect: Dialect
    routing: RoutingRequest
    """The properties of the request that the router uses."""
    hints: SchedulingHints
    """The properties of the request that admission uses."""
    light: bool = False
    """Whether the engine answers without generating, so that the request waits in the queue for such requests."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Headers of the answer that tell the client about its request."""
    labels: UsageLabels | None = None
    """What the engine's tokens are charged to; None: to nobody."""
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    """Started when the last byte of the client's request arrived."""
    digest: bytes = b""
    """`quarantine.body_digest` of the client's request; empty: it is not known to the quarantine."""

    def body_for(self, pool: str) -> bytes:
        """The body for a replica of `pool`: during a rolling change that may be another version of the model."""
        return self.body if pool == self.routing.pool else to_json({**from_json(self.body), "model": pool})


@dataclass(slots=True)
class Attempt:
    """One request at one replica: its answer, or the reason why there is none."""

    replica: ReplicaRecord
    connection: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    """Released when the answer has been copied, or at once after a failure."""
    response: aiohttp.ClientResponse | None = None
    """The answer; None: the attempt failed."""
    first_chunk: bytes = b""
    """First bytes of a body with status 200; the rest, and all of an error's body, are still to be read."""
    failure: str = ""
    """Reason of the failure, for the client."""
    may_have_begun: bool = False
    """Whether the replica may have begun with the request before the attempt failed."""
    suspect: bool = False
    """Whether the replica should get no requests for some seconds."""
    retriable: bool = True
    """Whether another replica may be tried after the failure."""


class Upstream:
    """The connection pool to all replicas."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._connector: EngineConnector | None = None
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Open the pool; needs a running event loop."""
        self._connector = EngineConnector()
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            timeout=self._timeout(self._config.request_timeout_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )

    async def stop(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    async def send(self, request: EngineRequest, replica: ReplicaRecord) -> Attempt:
        """POST the request to a replica and wait for the first bytes of the answer's body.

        An engine sends the head of a stream long before its first token, and may die in between: only the first byte of the
        body counts as an answer. Raises ApiError 504 if the replica sends nothing for longer than `gateway.request_timeout_s`
        and the request's own deadline, and 502 for an answer that is no HTTP: the replica is there, and another one would
        answer the same.
        """
        attempt = Attempt(replica)
        silent_s = max(self._config.request_timeout_s, request.hints.left_s(time.monotonic()))
        try:
            response = await attempt.connection.enter_async_context(self._post(request, replica, silent_s))
            attempt.first_chunk = await response.content.readany() if response.status == 200 else b""
            request.stopwatch.answered = time.perf_counter()
            if response.status == 503 and UNAVAILABLE_HEADER in response.headers:
                await _note_unavailable(attempt, response, request.model.base.name)
            else:
                attempt.response = response
                return attempt
        except aiohttp.SocketTimeoutError:
            # The replica may be well and the answer long: stuck engines are detected by other means (docs/adr/0019).
            await attempt.connection.aclose()
            raise too_slow(request.model.base.name, silent_s) from None
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError) as error:
            if is_protocol_error(error):
                await attempt.connection.aclose()
                raise unreadable(request.model.base.name) from error
            attempt.failure = f"A replica of {request.model.base.name} did not answer ({type(error).__name__})"
            attempt.suspect = True
            attempt.may_have_begun = not isinstance(
                error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError
            )
        except BaseException:
            await attempt.connection.aclose()
            raise
        await attempt.connection.aclose()
        return attempt

    async def alive_status(self, replica: ReplicaRecord) -> int | None:
        """HTTP status of the replica's liveness route: 200 ready, 503 alive but not ready; None: no answer."""
        url, headers = replica.url + ALIVE_PATH, {TOKEN_HEADER: replica.token}
        try:
            async with asyncio.timeout(ALIVE_TIMEOUT_S), self._opened().get(url, headers=headers) as response:
                return response.status
        except (TimeoutError, aiohttp.ClientError, OSError):
            return None

    def abort_connections(self, replica: ReplicaRecord) -> None:
        """Break every connection to a replica; requests on them fail as if the replica's process had ended."""
        if self._connector is not None:
            self._connector.abort_connections(replica.url)

    def _post(
        self, request: EngineRequest, replica: ReplicaRecord, silent_s: float
    ) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse]:
        adapter = request.model.adapter
        headers = {
            "content-type": "application/json",
            **request.headers,
            **(adapter_headers(adapter) if adapter else {}),
            **({LABELS_HEADER: request.labels.to_header()} if request.labels else {}),
            TOKEN_HEADER: replica.token,
        }
        return self._opened().post(
            replica.url + request.path,
            data=TimedBody(request.body_for(replica.pool), request.stopwatch),
            headers=headers,
            timeout=self._timeout(silent_s),
        )

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Upstream.start was not called.")
        return self._session

    def _timeout(self, silent_s: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout_s, sock_read=silent_s)


class TimedBody(aiohttp.BytesPayload):
    """A request body that is written piece by piece, and records when the last one was."""

    def __init__(self, body: bytes, stopwatch: Stopwatch) -> None:
        super().__init__(body, content_type="application/json")
        self._stopwatch = stopwatch

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Called by aiohttp once it has a connection."""
        if len(self._value) <= PIECE_BYTES:
            await super().write_with_length(writer, content_length)
        else:
            # At once, what the connection does not take would be copied, and nothing else run meanwhile.
            body = self._value if content_length is None else self._value[:content_length]
            for start in range(0, len(body), PIECE_BYTES):
                await writer.write(body[start : start + PIECE_BYTES])
        self._stopwatch.sent = time.perf_counter()


class EngineConnector(aiohttp.TCPConnector):
    """aiohttp's connection pool, with keepalive, and with a way to break all connections to one replica."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._open: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        """A connection for a request, new or from the pool."""
        connection = await super().connect(req, traces, timeout)
        if connection.transport is not None and connection.transport not in self._open:
            keep_alive(connection.transport, unreachable_s=UNREACHABLE_S)
            self._open.add(connection.transport)
        return connection

    def abort_connections(self, url: str) -> int:
        """Abort every connection to the host and port of `url`; returns their number."""
        address = urlsplit(url)
        found = [
            each
            for each in self._open
            if (each.get_extra_info("peername") or ())[:2] == (address.hostname, address.port)
        ]
        for transport in found:
            transport.abort()
        return len(found)


def is_protocol_error(error: BaseException) -> bool:
    """Whether an answer could not be read although the connection to its replica was not lost."""
    if isinstance(error, aiohttp.ClientPayloadError):
        return not str(error).startswith(NOT_COMPLETED)
    return isinstance(error, aiohttp.ClientResponseError | HttpProcessingError)


async def _note_unavailable(attempt: Attempt, response: aiohttp.ClientResponse, model: str) -> None:
    """Record the refusal of a replica (`UNAVAILABLE_HEADER`)."""
    reason = response.headers[UNAVAILABLE_HEADER]
    attempt.failure = f"{model}: {await _message_of(response)}"
    # The request has waited at this replica for an adapter slot; it would wait at the next one as long again.
    attempt.retriable = reason != "adapters"
    attempt.suspect = reason != "adapters"
    attempt.may_have_begun = reason == "died"


async def _message_of(response: aiohttp.ClientResponse) -> str:
    try:
        return str((await response.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, aiohttp.ClientError):
        return "not available"
