"""The gateway's connections to engine replicas: chooses one for a call, sends it, and waits until the answer has begun.

A request that no byte was answered to may be tried once more on another replica. Answers that nobody takes are cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import aiohttp
from pydantic_core import from_json, to_json

from tandem.config.serving.app import GatewayConfig
from tandem.gateway.admission.control import Admission
from tandem.gateway.admission.queue import SchedulingHints
from tandem.gateway.catalog import ResolvedModel
from tandem.gateway.connector import EngineConnector
from tandem.gateway.dialect import Dialect
from tandem.gateway.errors import no_replica, too_slow
from tandem.gateway.fleet import Fleet
from tandem.gateway.latency import RecordLatency, Stopwatch, TimedBody, ignore_latency
from tandem.gateway.replica_probe import ReplicaProbe
from tandem.routing.records import TOKEN_HEADER, UNAVAILABLE_HEADER, ReplicaRecord, adapter_headers
from tandem.routing.request import RoutingRequest

ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One request as an engine is to get it."""

    path: str
    body: bytes
    model: ResolvedModel
    headers: Mapping[str, str]
    """For the engine."""
    dialect: Dialect
    routing: RoutingRequest
    """The same for the router."""
    hints: SchedulingHints
    """How urgent it is."""
    light: bool = False
    """Whether it needs no place in a queue."""
    started: int = 0
    """Replicas that may have begun with it and gave no answer."""
    warnings: Mapping[str, str] = field(default_factory=dict)
    """Headers of the answer, for the client."""
    watch: Stopwatch = field(default_factory=Stopwatch)
    """Started when the request's last byte came in."""

    def body_for(self, base: str) -> bytes:
        """The body for a replica of `base`: while a model changes, that may be another version than was meant."""
        return self.body if base == self.routing.pool else to_json({**from_json(self.body), "model": base})


class StartedResponse(NamedTuple):
    """An answer that has begun."""

    answer: aiohttp.ClientResponse
    first: bytes
    """The first of its bytes; those that follow are still to be read. An error's are all still to be read."""
    replica: ReplicaRecord
    """Who gives it."""


class UnderWay(Protocol):
    """An answer that is being sent."""

    sending_since: float
    """When the client was given what it has not taken yet."""

    def cut(self) -> None:
        """End it: nobody takes what is sent."""
        ...


class Upstream:
    """The gateway's connections to all engines."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        config: GatewayConfig,
        record_latency: RecordLatency = ignore_latency,
        name: str = "",
    ) -> None:
        self.name = name.encode()
        self.admission = admission
        self.record_latency = record_latency
        self.under_way: set[UnderWay] = set()
        """Answers that are being sent."""
        self._fleet = fleet
        self._watching: asyncio.Task[None] | None = None
        self._config = config
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        """Open the connection pool; needs the running loop."""
        connector = EngineConnector()
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout(self._config.request_timeout_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        self._fleet.on_lost = ReplicaProbe(self._session, connector, self._fleet).start
        self._watching = asyncio.create_task(self._cut_stalled())

    async def stop(self) -> None:
        """Close all connections."""
        if self._watching is not None:
            self._watching.cancel()
        if self._session is not None:
            await self._session.close()

    def has(self, model: ResolvedModel) -> bool:
        """Whether a replica of just this target is ready."""
        return self._fleet.has_pool(model.pool)

    async def open(self, call: EngineRequest, held: contextlib.AsyncExitStack, started: int = 0) -> StartedResponse:
        """Send the call and wait until the answer has begun; `held` keeps the connection and the count.

        It has begun with the first byte of its body: an engine sends the head of a stream long before, and may still die.
        `started`: how many replicas may have begun with the call before. Raises NoReplica, with how many there are now, if none
        takes it, and ApiError 504 if one says nothing for longer than the config and the call's own deadline allow.
        """
        if self._session is None:
            raise RuntimeError("Proxy.start was not called.")
        model, adapter = call.model, call.model.adapter
        sent = {"content-type": "application/json", **call.headers, **(adapter_headers(adapter) if adapter else {})}
        avoid: list[str] = []
        reason = f"No replica of {model.base.name} is ready"
        while started < ATTEMPTS and len(avoid) < ATTEMPTS:
            replica = self._fleet.choose(call.routing, avoid)
            if replica is None:
                break
            avoid.append(replica.id)
            attempt = contextlib.AsyncExitStack()
            silent_s = max(self._config.request_timeout_s, call.hints.left_s(time.monotonic()))
            try:
                attempt.enter_context(self._fleet.counting(call.routing, replica))
                request = self._session.post(
                    replica.url + call.path,
                    data=TimedBody(call.body_for(replica.pool), call.watch),
                    headers={**sent, TOKEN_HEADER: replica.token},
                    timeout=self._timeout(silent_s),
                )
                answer = await attempt.enter_async_context(request)
                first = await answer.content.readany() if answer.status == 200 else b""
                call.watch.answered = time.perf_counter()
            except aiohttp.SocketTimeoutError:
                # It may be well and the answer long: what stands still is found by other means (docs/adr/0019).
                await attempt.aclose()
                raise too_slow(model.base.name, silent_s) from None
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                await attempt.aclose()
                self._fleet.suspect(replica)
                started += not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
                reason = f"A replica of {model.base.name} did not answer ({type(error).__name__})"
                continue
            except BaseException:
                await attempt.aclose()
                raise
            if answer.status == 503 and UNAVAILABLE_HEADER in answer.headers:
                reason = f"{model.base.name}: {await _said(answer)}"
                why = answer.headers[UNAVAILABLE_HEADER]
                if why != "adapters":
                    self._fleet.suspect(replica)
                    started += why == "died"
                else:
                    started = ATTEMPTS  # it has waited there already
                await attempt.aclose()
                continue
            if answer.status == 200:
                self._fleet.answered(call.routing, replica)
            held.push_async_exit(attempt)
            return StartedResponse(answer, first, replica)
        refusal = no_replica(reason, self._config.retry_after_s)
        refusal.started = started
        raise refusal

    def _timeout(self, silent_s: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self._config.connect_timeout_s, sock_read=silent_s)

    async def _cut_stalled(self) -> None:
        """End the answers of clients that take nothing of them."""
        while True:
            await asyncio.sleep(self._config.client_stall_s / 4)
            limit = time.monotonic() - self._config.client_stall_s
            for forwarded in [each for each in self.under_way if each.sending_since < limit]:
                forwarded.cut()


async def _said(answer: aiohttp.ClientResponse) -> str:
    try:
        return str((await answer.json())["error"]["message"])
    except (ValueError, KeyError, TypeError, aiohttp.ClientError):
        return "not available"
