"""Admission control: two bounded queues for each model; rejects with 429, 503 or 504 the requests that exceed them.

One is for requests that generate or encode, whose slots are places in the engines' batches; the other for requests that only
count or convert tokens (`EngineRoute.light`), whose slots are bytes of text that an engine's tokenizer works on at once.

One for each gateway app. `queue` decides; this module adds the clock, the number of ready replicas and the waiting tasks. Where
nothing waits, a request passes in some microseconds. Several gateways have equal shares of each limit.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Collection, Iterable
from typing import Protocol

from tandem.config.serving.app import GatewayConfig
from tandem.gateway.admission.queue import Outcome, Queue, SchedulingHints, Ticket
from tandem.gateway.errors import ApiError, no_replica
from tandem.gateway.replicas.fleet import Fleet
from tandem.routing.records import ReplicaRecord, ServedModel

PREFETCH_SHARE = 0.25
"""Requests queued inside an engine, as a share of its batch size, so that it never waits for the next request."""
MIN_PREFETCH = 4
LIGHT_PER_REPLICA = 16
"""Slots of light requests at each replica, of 64 KiB of text each (`LIGHT_SLOT_BYTES`): an engine has one tokenizer."""
SWEEP_S = 0.1
"""Seconds between two checks for waiting requests whose time is over."""
MAX_RETRY_AFTER_S = 60
"""Longest Retry-After that the SDKs obey, in seconds."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
"""First and largest pause, in seconds, before a request that no replica took is queued again; it doubles each time."""


class QueueMetrics(Protocol):
    """Receives measurements of the queues."""

    def load(self, model: str, running: int, waiting: int) -> None:
        """A model's requests in flight, and those that wait, now."""
        ...

    def refused(self, model: str, outcome: str) -> None:
        """A request was refused, with the value of a `queue.Outcome`; or it missed its deadline after its start (`late`)."""
        ...


class NoQueueMetrics:
    """A QueueMetrics that does nothing."""

    def load(self, model: str, running: int, waiting: int) -> None:
        """Do nothing."""

    def refused(self, model: str, outcome: str) -> None:
        """Do nothing."""


class Admission:
    """The queues of all served models at one gateway; used in its event loop."""

    def __init__(
        self, models: Iterable[ServedModel], fleet: Fleet, config: GatewayConfig, metrics: QueueMetrics | None = None
    ) -> None:
        self._fleet = fleet
        self._config = config
        self.metrics = metrics or NoQueueMetrics()
        self._models = {model.id: model for model in models}
        self._queues, self._light_queues = (
            {model.id: self._new_queue(model) for model in self._models.values()} for _ in range(2)
        )
        self._wakeups: dict[Ticket, asyncio.Future[Outcome]] = {}
        self._sweep_timer: asyncio.TimerHandle | None = None
        fleet.add_listener(self.refresh)

    def waiting(self) -> dict[str, int]:
        """Numbers of waiting requests, by model id."""
        return {name: len(queue) + len(self._light_queues[name]) for name, queue in self._queues.items()}

    def slot(self, model: ServedModel, hints: SchedulingHints, *, light: bool = False) -> AdmissionSlot:
        """The admission slot of one request; `light`: in the queue of the light requests."""
        return AdmissionSlot(self, model, hints, self.queue(model, light=light))

    def refresh(self, changed: Collection[str] | None = None) -> None:
        """Apply the fleet's current state to the limits; start the requests that may start.

        `changed`: pools and deployments whose replicas changed; None: any.
        """
        now = time.monotonic()
        for name, queue in self._queues.items():
            model, light = self._models[name], self._light_queues[name]
            if changed is not None and model.id not in changed and model.deployment not in changed:
                continue
            queue.set_limit(self._limit(model), now)
            light.set_limit(self._light_limit(model), now)
            self.serve(queue)
            self.serve(light)
            self.metrics.load(name, queue.running, len(queue) + len(light))

    def queue(self, model: ServedModel, *, light: bool = False) -> Queue:
        """The queue of a model, or that of its light requests."""
        return (self._light_queues if light else self._queues)[model.id]

    async def sleep(self, queue: Queue, ticket: Ticket) -> Outcome:
        """Wait until a queued request may start or is refused; if cancelled, it leaves the queue."""
        wakeup: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._wakeups[ticket] = wakeup
        if self._sweep_timer is None:
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)
        try:
            return await wakeup
        except asyncio.CancelledError:
            if wakeup.done() and not wakeup.cancelled() and wakeup.result() is Outcome.START:
                self.start_cancelled(queue, ticket)
            queue.leave(ticket)
            raise
        finally:
            del self._wakeups[ticket]

    def notify(self, queue: Queue, ticket: Ticket, outcome: Outcome) -> None:
        """Wake a waiting request; one that has just been cancelled gives its slot back."""
        wakeup = self._wakeups.get(ticket)
        if wakeup is not None and not wakeup.done():
            wakeup.set_result(outcome)
        elif outcome is Outcome.START:
            queue.start_cancelled(ticket)

    def ended(self, queue: Queue, ticket: Ticket, *, complete: bool) -> None:
        """A started request has ended; the next may start."""
        queue.ended(ticket, time.monotonic(), complete=complete)
        self.serve(queue)

    def start_cancelled(self, queue: Queue, ticket: Ticket) -> None:
        """A started request was taken by no replica; the next may start."""
        queue.start_cancelled(ticket)
        self.serve(queue)

    def serve(self, queue: Queue) -> None:
        """Start the requests that may start."""
        if len(queue):
            for ticket, outcome in queue.pop_startable(time.monotonic()):
                self.notify(queue, ticket, outcome)

    def refusal(self, model: ServedModel, queue: Queue, hints: SchedulingHints, outcome: Outcome) -> ApiError:
        """The error for a request that was not started."""
        self.metrics.refused(model.id, outcome.value)
        name = model.name
        if outcome is Outcome.UNSERVED:
            waited = f" within {queue.hold_s:g} s" if queue.hold_s else ""
            return no_replica(f"No replica of {name} is ready{waited}", self._config.retry_after_s)
        if outcome is Outcome.EXPIRED:
            waited_s = time.monotonic() - hints.arrived
            return expired_error(f"The request waited {waited_s:.1f} s for {name} and was not started")
        estimated_wait_s = queue.estimated_wait_s(hints) or self._config.retry_after_s
        retry_s = min(MAX_RETRY_AFTER_S, max(1, math.ceil(estimated_wait_s)))
        load = f"{name} has {queue.running} requests in flight and {len(queue)} waiting"
        reason, code = {
            Outcome.FULL: (
                f"{load}, and more than {queue.max_waiting} may not wait (models[].max_queued).",
                "queue_full",
            ),
            Outcome.DISPLACED: (
                f"{load}: this one had to give its place to one of a better priority, or of a tenant with fewer.",
                "displaced",
            ),
            Outcome.DEADLINE_UNREACHABLE: (
                f"{load}: one more would wait about {estimated_wait_s:.1f} s, longer than this one has time for.",
                "deadline_unreachable",
            ),
        }[outcome]
        headers = {"Retry-After": str(retry_s)}
        return ApiError(429, f"{reason} Try again in {retry_s} s.", code=code, headers=headers)

    def _sweep(self) -> None:
        self._sweep_timer = None
        now = time.monotonic()
        for queue in (*self._queues.values(), *self._light_queues.values()):
            for ticket, outcome in queue.pop_overdue(now):
                self.notify(queue, ticket, outcome)
        if self._wakeups:
            self._sweep_timer = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)

    def _new_queue(self, model: ServedModel) -> Queue:
        return Queue(max_waiting=math.ceil(model.config.max_queued / self._config.replicas), hold_s=model.config.hold_s)

    def _light_limit(self, model: ServedModel) -> int:
        ready = self._fleet.ready(model.id, suspects=not model.config.hold_s)
        return math.ceil(len(ready) * LIGHT_PER_REPLICA / self._config.replicas)

    def _limit(self, model: ServedModel) -> int | None:
        """Sequences that may be in flight from this gateway for a model; None: no limit."""
        ready = self._fleet.ready(model.id, suspects=not model.config.hold_s)
        if not ready:
            return 0
        limits = [requests_per_replica(replica, model.config.requests_per_replica) for replica in ready]
        if None in limits:
            return None
        # Requests on draining replicas take no capacity of the ready ones.
        share = math.ceil(sum(limit or 0 for limit in limits) / self._config.replicas)
        return share + self._fleet.requests_outside(model.id, replicas=ready)


class AdmissionSlot:
    """Admission of one request: waiting in the queue, then in flight until `release`."""

    def __init__(self, admission: Admission, model: ServedModel, hints: SchedulingHints, queue: Queue) -> None:
        self.complete = False
        """Set when the whole answer has been sent."""
        self._admission = admission
        self._model = model
        self._queue = queue
        self._ticket = Ticket(hints)
        self._has_started = False
        self._is_running = False
        self._first_requeued_at: float | None = None
        self._backoff_s = FIRST_BACKOFF_S

    async def acquire(self) -> float:
        """Wait until the request may start; returns the seconds waited. Raises ApiError 429, 503 or 504 if it is refused."""
        outcome, displaced = self._queue.enter(self._ticket, time.monotonic())
        if displaced is not None:
            self._admission.notify(self._queue, displaced, Outcome.DISPLACED)
        return await self._wait_for_start(outcome)

    async def reacquire(self, error: ApiError) -> float:
        """Wait again after no replica took the request; raises `error` once `hold_s` has passed since the first time."""
        if self._is_running:
            self._is_running = False
            self._admission.start_cancelled(self._queue, self._ticket)
        now = time.monotonic()
        if self._first_requeued_at is None:
            self._first_requeued_at = now
        if now - self._first_requeued_at >= self._queue.hold_s:
            raise error
        pause_s, self._backoff_s = self._backoff_s, min(MAX_BACKOFF_S, 2 * self._backoff_s)
        await asyncio.sleep(pause_s)
        return pause_s + await self._wait_for_start(self._queue.reenter(self._ticket, time.monotonic()))

    def release(self) -> None:
        """The request has ended."""
        if self._is_running:
            self._is_running = False
            self._admission.ended(self._queue, self._ticket, complete=self.complete)

    def deadline_error(self) -> ApiError:
        """The error for a request whose deadline has passed."""
        if self._has_started:
            self._admission.metrics.refused(self._model.id, "late")
            return expired_error(f"The answer of {self._model.name} was not whole in time")
        return self._admission.refusal(self._model, self._queue, self._ticket.hints, Outcome.EXPIRED)

    async def _wait_for_start(self, outcome: Outcome) -> float:
        waited_s = 0.0
        if outcome is Outcome.WAIT:
            started_at = time.monotonic()
            outcome = await self._admission.sleep(self._queue, self._ticket)
            waited_s = time.monotonic() - started_at
        if outcome is not Outcome.START:
            raise self._admission.refusal(self._model, self._queue, self._ticket.hints, outcome)
        self._has_started = self._is_running = True
        return waited_s


def requests_per_replica(replica: ReplicaRecord, configured: int | None) -> int | None:
    """Requests in flight at one replica at most; None: no limit."""
    if configured is not None:
        return configured
    batch_size = replica.max_running
    return batch_size + max(MIN_PREFETCH, int(PREFETCH_SHARE * batch_size)) if batch_size else None


def expired_error(reason: str) -> ApiError:
    """504 for a request whose deadline has passed; `x-should-retry: false` keeps the SDKs from retrying."""
    return ApiError(
        504, f"{reason}: its time is over (`timeout`).", code="deadline_exceeded", headers={"x-should-retry": "false"}
    )
