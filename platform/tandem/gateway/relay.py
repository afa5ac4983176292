"""Relay of a request to an engine: admit it, route it, send it, copy the answer's bytes back.

Tokens are never Python objects here: chunks of bytes pass as they are read. A client that disconnects, a client that takes
nothing of its answer for `gateway.client_stall_s`, and an expired deadline all close the connection to the engine, which is how
vLLM learns to abort the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tandem.config.serving.app import GatewayConfig
from tandem.gateway.accounting.access_log import add_log_fields
from tandem.gateway.accounting.account import RequestAccount
from tandem.gateway.admission.control import Admission
from tandem.gateway.dialect import rewrite_errors
from tandem.gateway.errors import ApiError, from_engine, id_headers, no_replica, request_id, request_quarantined
from tandem.gateway.latency import HEADER, RecordLatency, header, ignore_latency
from tandem.gateway.replicas.engine_http import EngineAnswer, EngineHttpError, SilentEngineError
from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.replicas.loss import LossConfirmation
from tandem.gateway.replicas.upstream import Attempt, EngineRequest, Upstream
from tandem.gateway.requests.held_bytes import HeldBody, HeldBytes
from tandem.gateway.requests.quarantine import Quarantine
from tandem.gateway.retry_budget import RetryBudget
from tandem.gateway.stored.recording import Recording
from tandem.routing.records import ReplicaRecord

REPLICA, GATEWAY = b"x-tandem-replica", b"x-tandem-gateway"
"""Response headers: ids of the replica that answered and of the gateway that relayed."""
FORWARDED_HEADERS = ("content-type", "cache-control", "metadata")
"""Response headers of an engine that a client gets; `metadata` describes raw bytes of embeddings."""
BROKEN = "The engine stopped in the middle of its answer"
"""Message of the error event at the end of a broken stream."""

Prepare = Callable[[EngineRequest, RetryBudget], Awaitable[EngineRequest]]
"""Last change to a request after its admission and before it is sent."""
Requeue = Callable[[ApiError], Awaitable[None]]
"""Waits for another turn; raises the error if the request may not wait any longer."""


class Relay:
    """Fleet, admission, connections and limits shared by all relayed responses of a gateway."""

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission,
        upstream: Upstream,
        config: GatewayConfig,
        *,
        record_latency: RecordLatency = ignore_latency,
        name: str = "",
    ) -> None:
        """`name`: the gateway's id in response headers."""
        self.upstream = upstream
        self.fleet = fleet
        self.admission = admission
        self.record_latency = record_latency
        self.name = name.encode()
        self.held_bytes = HeldBytes(config.max_held_bytes, config.retry_after_s)
        """Bodies of requests whose engine has not answered yet."""
        self.quarantine = Quarantine(config.quarantine_s)
        """Bodies with which replicas were lost."""
        self.active: set[RelayedResponse] = set()
        """Responses that are being sent."""
        self._config = config
        self._watchdog: asyncio.Task[None] | None = None
        self._probes: set[asyncio.Task[None]] = set()
        self._loss = LossConfirmation(upstream, fleet)

    def start(self) -> None:
        """Begin to watch for stalled clients."""
        self._watchdog = asyncio.create_task(self._cut_stalled_clients())

    async def stop(self) -> None:
        """Close all connections."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._loss.stop()
        if self._probes:
            await asyncio.wait(self._probes)
        self.upstream.stop()

    async def first_answer(
        self, request: EngineRequest, budget: RetryBudget, resources: contextlib.ExitStack, requeue: Requeue
    ) -> Attempt:
        """The first attempt that a replica answers; `resources` keeps its connection, and its count as this gateway's work.

        Where no replica is left to try, `requeue` waits until there may be one, or raises the error that it is given. Raises
        ApiError 503 if no replica may get the request any more, 504 if a replica is silent for too long.
        """
        while True:
            replica = self.fleet.choose(request.routing, budget.tried_replicas) if budget.allows_attempt else None
            if replica is None:
                failure = budget.failure or f"No replica of {request.model.base.name} is ready"
                error = no_replica(failure, self._config.retry_after_s)
                if budget.exhausted:
                    raise error
                await requeue(error)
                budget.requeued()
                continue
            budget.tried_replicas.append(replica.id)
            with contextlib.ExitStack() as attempt_resources:
                attempt_resources.enter_context(self.fleet.counting(request.routing, replica))
                had_reached_engine, budget.reached_engine = budget.reached_engine, True
                attempt = await self.upstream.send(request, replica)
                if attempt.response is not None:
                    if attempt.response.status == 200:
                        self.fleet.answered(request.routing, replica)
                    resources.push(attempt_resources.pop_all())
                    resources.callback(attempt.response.close)
                    return attempt
            budget.record(attempt)
            budget.reached_engine = had_reached_engine or attempt.may_have_begun
            if attempt.may_have_begun:
                self.quarantine.replica_lost(request.digest, replica.id)
            if attempt.suspect:
                self.fleet.suspect(replica)

    def note_failure(self, digest: bytes, replica: ReplicaRecord) -> None:
        """An answer failed in its middle: if that was the end of its replica, the body is remembered."""
        self._probe(self._note_if_lost(digest, replica))

    def charge_if_lost(self, account: RequestAccount, replica: ReplicaRecord) -> None:
        """An answer broke off: if its replica is lost, the request is charged the tokens that have arrived. A live replica counts
        its engine's tokens itself.
        """
        self._probe(self._loss.call_if_lost(replica, account.engine_lost))

    def _probe(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _note_if_lost(self, digest: bytes, replica: ReplicaRecord) -> None:
        if await self.upstream.alive_status(replica) != 200:
            self.quarantine.replica_lost(digest, replica.id)

    async def _cut_stalled_clients(self) -> None:
        while True:
            await asyncio.sleep(self._config.client_stall_s / 4)
            stalled_before = time.monotonic() - self._config.client_stall_s
            for response in [candidate for candidate in self.active if candidate.sending_since < stalled_before]:
                response.cut()


class EndReason(Enum):
    """Reasons, beside the request's deadline, to end a response before the engine is done."""

    DISCONNECTED = auto()
    STALLED = auto()


class RelayedResponse(Response):
    """A response that relays a request to a replica when Starlette sends it."""

    def __init__(
        self,
        relay: Relay,
        request: EngineRequest,
        account: RequestAccount,
        prepare: Prepare | None = None,
        held_body: HeldBody | None = None,
        recording: Recording | None = None,
    ) -> None:
        """`held_body`: the body's share of the gateway's byte budget, released once an engine has answered.

        `recording` gets a copy of the answer, which is to be stored.
        """
        self.background = None
        self.sending_since = math.inf
        """Monotonic time since which the client has not taken a message; infinity: nothing is being sent."""
        self._relay = relay
        self._request = request
        self._account = account
        self._prepare = prepare
        self._held_body = held_body
        self._recording = recording
        self._slot = relay.admission.slot(request.model.base, request.hints, light=request.light)
        self._budget = RetryBudget()
        self._timeout = asyncio.timeout(None)
        self._ended_by: EndReason | None = None
        """Why the response ended before the engine was done; None: it has not, or its deadline had passed."""
        self._is_stream: bool | None = None
        """Whether the answer is a stream of events; None: its head has not been sent."""
        self._last_chunk = b""
        self._attempt: Attempt | None = None
        """The attempt whose answer is copied."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Copy until the engine is done, the client has disconnected, or the deadline has passed."""
        finish_by = self._request.hints.finish_by
        remaining_s = None if finish_by == math.inf else max(0.0, finish_by - time.monotonic())
        # Copied in this task, not in one of its own: a task begins after all others that are ready.
        self._timeout = asyncio.timeout(remaining_s)
        disconnect = asyncio.create_task(self._end_with_client(receive))
        self._relay.active.add(self)
        try:
            try:
                async with self._timeout:
                    await self._copy(scope, receive, send)
            except TimeoutError:
                if not self._timeout.expired():
                    raise
                if self._ended_by is EndReason.STALLED:
                    raise ConnectionAbortedError("The client took nothing of its answer and was cut off.") from None
                if self._ended_by is None:
                    await self._send_deadline_error(scope, send)
        finally:
            # Also if Serve cancels this task: whatever ends this request closes the connection to the engine.
            self._relay.active.discard(self)
            disconnect.cancel()
            self._account.close(reached_engine=self._budget.reached_engine)
            self._log_result(scope)
            self._drop_body()
            if self._recording is not None:
                self._recording.close()

    def cut(self) -> None:
        """End the response: the client takes nothing of it."""
        self._stop(EndReason.STALLED)

    async def _end_with_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._stop(EndReason.DISCONNECTED)

    def _stop(self, reason: EndReason) -> None:
        if self._ended_by is None and not self._timeout.expired():
            self._ended_by = reason
            # It may have ended by itself just now.
            with contextlib.suppress(RuntimeError):
                self._timeout.reschedule(asyncio.get_running_loop().time())

    def _drop_body(self) -> None:
        if self._request.body:
            self._request, self._prepare = replace(self._request, body=b""), None
        if self._held_body is not None:
            self._held_body.release()

    async def _first_answer(self, resources: contextlib.ExitStack) -> Attempt:
        """Admit the request and send it; `resources` also keeps its admission slot."""
        request, stopwatch, quarantine = self._request, self._request.stopwatch, self._relay.quarantine
        budget = self._budget
        budget.started_replicas = quarantine.lost_replicas(request.digest)
        if budget.exhausted:
            raise request_quarantined(budget.started_replicas, quarantine.seconds)
        await self._account.acquire()
        resources.callback(self._slot.release)
        # Time in a queue is not counted as the gateway's own.
        stopwatch.received += await self._slot.acquire()
        if self._prepare is not None:
            request = await self._prepare(request, budget)

        async def requeue(error: ApiError) -> None:
            stopwatch.received += await self._slot.reacquire(error)

        return await self._relay.first_answer(request, budget, resources, requeue)

    async def _copy(self, scope: Scope, receive: Receive, send: Send) -> None:
        dialect, id_ = self._request.dialect, request_id(scope)
        # An ASGI server holds each message back until the client has taken those before it, the last ones too.
        send_once = self._track_sending(send)
        with contextlib.ExitStack() as resources:
            attempt = await self._first_answer(resources)
            self._attempt = attempt
            # It is not sent again once an engine has answered.
            self._drop_body()
            answer, chunk = attempt.response, attempt.first_chunk
            assert answer is not None
            self._account.read_head(answer.headers)
            if answer.status >= 400:
                body = b""
                with contextlib.suppress(EngineHttpError):  # its status says enough
                    body = await answer.read()
                error = from_engine(answer.status, body, self._request.model.base)
                error.headers |= self._request.warnings
                await error.response(dialect, scope)(scope, receive, send_once)
                return
            explain = self._request.model.engine.requests.explain_error
            self._is_stream = is_stream = answer.content_type.startswith("text/event-stream")
            await self._send_head(send_once, attempt, answer, id_headers(scope))
            failed = False
            try:
                while chunk:
                    if is_stream:
                        chunk = self._account.read_chunk(chunk)
                    rewritten = rewrite_errors(chunk, dialect, id_, explain) if is_stream else chunk
                    failed = failed or rewritten is not chunk
                    self._last_chunk = rewritten or self._last_chunk
                    self.sending_since = time.monotonic()
                    await send({"type": "http.response.body", "body": rewritten, "more_body": True})
                    self.sending_since = math.inf
                    if self._recording is not None:
                        self._recording.add(rewritten)
                    chunk = await answer.read_any()
            except EngineHttpError as error:
                self._relay.charge_if_lost(self._account, attempt.replica)
                failed = not isinstance(error, SilentEngineError)
                # Too late for a status. A stream can still end with an error event; other answers must look cut off.
                if failed:
                    self._relay.note_failure(self._request.digest, attempt.replica)
                if not is_stream:
                    raise
                await self._send_error_event(send_once, 502, f"{BROKEN} ({error}).", "engine_unavailable", id_)
            else:
                self._slot.complete = answer.status == 200
                if failed:
                    self._relay.note_failure(self._request.digest, attempt.replica)
                else:
                    self._relay.quarantine.answered(self._request.digest)
                    if self._recording is not None:
                        self._recording.complete(is_stream=is_stream)
            await send_once({"type": "http.response.body", "body": b""})

    async def _send_head(
        self, send: Send, attempt: Attempt, answer: EngineAnswer, request_ids: Mapping[str, str]
    ) -> None:
        gateway_ms, engine_ms = self._request.stopwatch.split_ms()
        forwarded = {name: answer.headers[name] for name in FORWARDED_HEADERS if name in answer.headers}
        headers = [(name.encode(), value.encode("latin-1")) for name, value in forwarded.items()]
        headers += [
            (HEADER, header(gateway_ms, engine_ms)),
            (REPLICA, attempt.replica.id.encode()),
            (GATEWAY, self._relay.name),
        ]
        added = {**self._request.warnings, **self._account.headers}
        headers += [(name.encode(), value.encode()) for name, value in added.items()]
        headers += [(name.encode(), value.encode("latin-1")) for name, value in request_ids.items()]
        if answer.content_length is not None:
            headers.append((b"content-length", str(answer.content_length).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        self._relay.record_latency(self._request.path, gateway_ms)

    def _log_result(self, scope: Scope) -> None:
        """Add model, replica and token counts to the request's line in the access log."""
        labels, counts, attempt = self._account.labels, self._account.counts, self._attempt
        add_log_fields(
            scope,
            model=labels.model,
            adapter=labels.adapter or None,
            replica=None if attempt is None else attempt.replica.id,
            prompt_tokens=None if counts is None else counts.prompt,
            completion_tokens=None if counts is None else counts.completion,
        )

    async def _send_deadline_error(self, scope: Scope, send: Send) -> None:
        error = self._slot.deadline_error()
        if self._is_stream is None:
            raise error
        if not self._is_stream:
            raise TimeoutError(error.message)
        # A client that takes nothing cannot be sent an error either.
        async with asyncio.timeout(1.0):
            await self._send_error_event(send, error.status, error.message, error.code, request_id(scope))
            await send({"type": "http.response.body", "body": b""})

    async def _send_error_event(self, send: Send, status: int, message: str, code: str | None, id_: str) -> None:
        event = self._request.dialect.event(status, message, code=code, request=id_, last=self._last_chunk)
        await send({"type": "http.response.body", "body": event, "more_body": True})

    def _track_sending(self, send: Send) -> Send:
        """`send` with `sending_since` kept; for messages of which an answer has one (the loop over chunks does it inline)."""

        async def timed_send(message: Message) -> None:
            self.sending_since = time.monotonic()
            await send(message)
            self.sending_since = math.inf

        return timed_send
