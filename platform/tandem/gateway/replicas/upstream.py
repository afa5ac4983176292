"""Attempts at engine replicas: one POST for each.

An attempt ends with the first bytes of an answer, or with the reason why there is none and whether the replica may have begun
with the request. Which replica is tried, and how often, is decided in `relay`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic_core import from_json, to_json

from tandem.config.serving.app import GatewayConfig
from tandem.gateway.admission.queue import SchedulingHints
from tandem.gateway.dialect import Dialect
from tandem.gateway.errors import engine_timeout, invalid_engine_answer
from tandem.gateway.latency import Stopwatch
from tandem.gateway.models.catalog import ResolvedModel
from tandem.gateway.replicas.engine_http import (
    EngineAnswer,
    EngineHttpError,
    InvalidAnswerError,
    NotConnectedError,
    SilentEngineError,
)
from tandem.gateway.replicas.engine_pool import EngineConnections
from tandem.routing.records import ALIVE_PATH, TOKEN_HEADER, UNAVAILABLE_HEADER, ReplicaRecord, adapter_headers
from tandem.routing.request import RoutingRequest
from tandem.serve.app_tls import ClientTls
from tandem.usage.records import UsageLabels
from tandem.usage.wire import LABELS_HEADER

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
    """Response headers with warnings about the client's request."""
    labels: UsageLabels | None = None
    """Labels of the usage that the engine's tokens are counted as; None: they are not counted."""
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
    response: EngineAnswer | None = None
    """The answer, to be closed when it has been copied; None: the attempt failed."""
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
    """Sends requests to replicas."""

    def __init__(self, config: GatewayConfig, tls: ClientTls | None = None) -> None:
        """`tls`: for engines that speak TLS."""
        self._config = config
        self._connections = EngineConnections(config.connect_timeout_s, tls)

    def stop(self) -> None:
        """Close all connections."""
        self._connections.close()

    async def send(self, request: EngineRequest, replica: ReplicaRecord) -> Attempt:
        """POST the request to a replica and wait for the first bytes of the answer's body.

        An engine sends the head of a stream long before its first token, and may die in between: only the first byte of the
        body counts as an answer. Raises ApiError 504 if the replica sends nothing for longer than `gateway.request_timeout_s`
        and the request's own deadline, and 502 for an answer that is no HTTP: the replica is there, and another one would
        answer the same.
        """
        attempt = Attempt(replica)
        silent_s = max(self._config.request_timeout_s, request.hints.left_s(time.monotonic()))
        response: EngineAnswer | None = None
        try:
            response = await self._post(request, replica, silent_s)
            await response.wait_for_head()
            attempt.first_chunk = await response.read_any() if response.status == 200 else b""
            request.stopwatch.answered = time.perf_counter()
            if response.status != 503 or UNAVAILABLE_HEADER not in response.headers:
                attempt.response = response
                return attempt
            await _note_unavailable(attempt, response, request.model.base.name)
        except SilentEngineError:
            # The replica may be well and the answer long: stuck engines are detected by other means (docs/adr/0019).
            raise engine_timeout(request.model.base.name, silent_s) from None
        except InvalidAnswerError as error:
            raise invalid_engine_answer(request.model.base.name) from error
        except EngineHttpError as error:
            attempt.failure = f"A replica of {request.model.base.name} did not answer ({error})"
            attempt.suspect = True
            attempt.may_have_begun = not isinstance(error, NotConnectedError)
        finally:
            if response is not None and attempt.response is None:
                response.close()
        return attempt

    async def alive_status(self, replica: ReplicaRecord) -> int | None:
        """HTTP status of the replica's liveness route: 200 ready, 503 alive but not ready; None: no answer."""
        headers = {TOKEN_HEADER: replica.token}
        try:
            async with asyncio.timeout(ALIVE_TIMEOUT_S):
                response = await self._connections.request(
                    "GET", replica.url + ALIVE_PATH, headers, silent_s=ALIVE_TIMEOUT_S
                )
                try:
                    await response.wait_for_head()
                    await response.read()
                finally:
                    response.close()
                return response.status
        except (TimeoutError, EngineHttpError):
            return None

    def abort_connections(self, replica: ReplicaRecord) -> None:
        """Break every connection to a replica; requests on them fail as if the replica's process had ended."""
        self._connections.abort(replica.url)

    async def _post(self, request: EngineRequest, replica: ReplicaRecord, silent_s: float) -> EngineAnswer:
        adapter = request.model.adapter
        headers = {
            "content-type": "application/json",
            **request.headers,
            **(adapter_headers(adapter) if adapter else {}),
            **({LABELS_HEADER: request.labels.to_header()} if request.labels else {}),
            TOKEN_HEADER: replica.token,
        }
        return await self._connections.request(
            "POST",
            replica.url + request.path,
            headers,
            request.body_for(replica.pool),
            silent_s=silent_s,
            on_sent=request.stopwatch.mark_sent,
        )


async def _note_unavailable(attempt: Attempt, response: EngineAnswer, model: str) -> None:
    """Record the refusal of a replica (`UNAVAILABLE_HEADER`)."""
    reason = response.headers[UNAVAILABLE_HEADER]
    attempt.failure = f"{model}: {await _message_of(response)}"
    # The request has waited at this replica for an adapter slot; it would wait at the next one as long again.
    attempt.retriable = reason != "adapters"
    attempt.suspect = reason != "adapters"
    attempt.may_have_begun = reason == "died"


async def _message_of(response: EngineAnswer) -> str:
    try:
        return str(from_json(await response.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, EngineHttpError):
        return "not available"
