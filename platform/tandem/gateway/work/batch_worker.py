"""Worker for batches at a gateway: claims requests from the queue, sends them through the gateway's own routes, reports answers.

Requests pass the same checks, admission, routing and usage records as a client's, at a lower priority. One that is refused for
the moment goes back to the queue and holds no place meanwhile. Answers are made durable before they are reported. A gateway that
dies leaves its requests to the others when its leases have run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from tandem.config.serving.batches import BatchesConfig
from tandem.errors import TandemError
from tandem.gateway.work.batch_answers import UnreportedAnswers
from tandem.gateway.work.batch_capacity import BatchCapacity, PoolLoad
from tandem.gateway.work.batch_sender import BatchSender
from tandem.gateway.work.turns import ModelTurns, shares
from tandem.jobs.batches.stored import QUEUE
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Item, Lease, WaitingItems
from tandem.tasks import stop

LEASE_S = 60.0
RENEW_S = 15.0
POLL_S, IDLE_POLL_S = 0.1, 2.0
"""Seconds between two claims while there is work, and while there is none."""
EXPECTED_S, EXPECTED_POLL_S = 10.0, 0.2
"""Seconds for which requests are expected, and between two looks then."""
REPORT_S = 0.5
"""Seconds for which answers are collected, to be written together."""
CLAIMED_AT_ONCE = 64
UNSERVED, UNSERVED_AT_ONCE = "", 8
"""Base of the names that no model has, and their requests under way at most: they are answered with the gateway's 404."""
MAX_UNREPORTED_BYTES = 64 * 2**20
"""Bytes of answers that wait to be written; while there are more, nothing is claimed."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Loads(Protocol):
    """The loads of replicas by names of models."""

    async def learn(self, names: Iterable[str]) -> None:
        """Look up these names, and forget others."""

    def __call__(self, name: str) -> PoolLoad | None:
        """The load for a name; None: no such model is served here."""


class BatchWorker:
    """A background service of one gateway."""

    def __init__(self, queue: ItemQueue, sender: BatchSender, loads: Loads, config: BatchesConfig, name: str) -> None:
        self._queue = queue
        self._sender = sender
        self._loads = loads
        self._config = config
        self._owner = f"{name}:{uuid.uuid4().hex[:8]}"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-database")
        self._capacities: dict[str, BatchCapacity] = defaultdict(lambda: BatchCapacity(config.share, config.slowdown))
        """By base model."""
        self._turns: dict[str, ModelTurns] = defaultdict(ModelTurns)
        """By base model."""
        self._waiting: set[WaitingItems] = set()
        """At the last look, without those that were all claimed since."""
        self._looked_at = -IDLE_POLL_S
        self._expects_until = 0.0
        """Monotonic clock."""
        self._paused_until: dict[WaitingItems, float] = {}
        """Of which a request was refused for the moment; monotonic clock."""
        self._served_at: dict[WaitingItems, float] = {}
        """When a request was last claimed; monotonic clock."""
        self._tasks: dict[Lease, asyncio.Task[None]] = {}
        self._under_way: Counter[WaitingItems] = Counter()
        self._answers = UnreportedAnswers(queue)
        self._services: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to claim."""
        if self._config.enabled:
            loops = ((self._claim, POLL_S), (self._report, REPORT_S), (self._renew, RENEW_S))
            self._services = [asyncio.create_task(self._repeat(work, pause_s)) for work, pause_s in loops]

    def expect(self) -> None:
        """Requests are about to be queued: look for them often for some seconds."""
        self._expects_until = time.monotonic() + EXPECTED_S

    @property
    def is_running(self) -> bool:
        """Whether it claims: after `start`, until `stop`."""
        return bool(self._services)

    async def stop(self) -> None:
        """Stop claiming. Requests under way are given up, and another gateway sends them; answers that are there are reported."""
        for task in (*self._services, *self._tasks.values()):
            await stop(task)
        self._services = []
        with contextlib.suppress(TandemError):
            await self._report()
        await self._in_thread(self._answers.close)
        self._sender.close()
        self._queue.close()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _repeat(self, work: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            try:
                await work()
            except TandemError as error:
                # The database or the disk is away: later it may answer.
                log.warning("Batches: %s", error)
                await asyncio.sleep(IDLE_POLL_S)
            except Exception:
                # A gateway that goes on claiming and reports nothing would keep the requests from all others.
                log.exception("Batches: a fault. It is tried again.")
                await asyncio.sleep(IDLE_POLL_S)
            await asyncio.sleep(pause_s)

    async def _in_thread(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Work on the database, or on segments."""
        call = functools.partial(work, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    # ---- claims ----

    async def _claim(self) -> None:
        """Claim what there is capacity for, of few models of each base at once, and begin to send it."""
        now = time.monotonic()
        if now - self._looked_at >= (EXPECTED_POLL_S if now < self._expects_until else IDLE_POLL_S):
            await self._look(now)
        if self._answers.num_bytes > MAX_UNREPORTED_BYTES:
            return
        failing = self._answers.failing_tenants
        waiting: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        """Tenants by base and model."""
        for model, tenant in sorted(self._waiting - self._paused_until.keys()):
            if tenant not in failing:
                waiting[self._base_of(model)][model].append(tenant)
        for base, models in waiting.items():
            under_way = {model for model, _ in self._under_way if self._base_of(model) == base}
            for model in self._turns[base].allowed(models.keys(), under_way, now):
                await self._claim_of(model, models[model], self._capacity_of(base, model, now))

    async def _look(self, now: float) -> None:
        """Find out what waits, and which models it is for."""
        self._waiting, self._looked_at = set(await self._in_thread(self._queue.waiting, QUEUE)), now
        self._paused_until = {group: until for group, until in self._paused_until.items() if until > now}
        self._served_at = {group: at for group, at in self._served_at.items() if group in self._waiting}
        await self._loads.learn({model for model, _ in (*self._waiting, *self._under_way)})

    async def _claim_of(self, model: str, tenants: list[str], capacity: int) -> None:
        """Claim requests for a model, of all tenants alike; first of those that had none claimed for longest."""
        groups = sorted(
            (WaitingItems(model, tenant) for tenant in tenants), key=lambda each: self._served_at.get(each, 0.0)
        )
        for group, share in shares(capacity, {group: self._under_way[group] for group in groups}).items():
            self._served_at[group] = time.monotonic()
            items = await self._in_thread(
                self._queue.claim, QUEUE, self._owner, LEASE_S, limit=share, adapter=model, tenant=group.tenant
            )
            for item in items:
                assert item.lease is not None
                self._under_way[group] += 1
                self._tasks[item.lease] = asyncio.create_task(self._send(item, item.lease, group))
            if len(items) < share:
                self._waiting.discard(group)

    def _capacity_of(self, base: str, model: str, now: float) -> int:
        """Requests that may be claimed for a model of a base."""
        in_flight = sum(count for (each, _), count in self._under_way.items() if self._base_of(each) == base)
        pool = self._loads(model)
        capacity = (
            UNSERVED_AT_ONCE - in_flight if pool is None else self._capacities[base].free(pool.load, in_flight, now)
        )
        return max(0, min(capacity, self._config.max_concurrent - self._under_way.total(), CLAIMED_AT_ONCE))

    def _running(self, model: str) -> int:
        """Requests of the base of a model that are under way, those of clients included."""
        pool = self._loads(model)
        return 0 if pool is None else pool.load.running

    def _base_of(self, model: str) -> str:
        pool = self._loads(model)
        return UNSERVED if pool is None else pool.base

    # ---- requests ----

    async def _send(self, item: Item, lease: Lease, group: WaitingItems) -> None:
        """Send one request, and keep its outcome for the next report."""
        began, running = time.monotonic(), self._running(group.adapter)
        try:
            outcome = await self._sender.send(item)
        finally:
            self._tasks.pop(lease, None)
            self._under_way[group] -= 1
            if not self._under_way[group]:
                del self._under_way[group]
        if outcome.retry_after_s is not None:
            # Others like it would be refused too.
            self._paused_until[group] = time.monotonic() + outcome.retry_after_s
        elif outcome.num_tokens:
            now, base = time.monotonic(), self._base_of(group.adapter)
            self._capacities[base].answered(
                (running + self._running(group.adapter)) / 2, now - began, outcome.num_tokens, now
            )
        self._answers.add(outcome)

    async def _report(self) -> None:
        """Write the answers since the last report, and report their places."""
        await self._answers.report(self._in_thread)
        await self._sender.close_unused()

    async def _renew(self) -> None:
        """Hold the requests under way, and those whose answers wait to be reported; end those that were cancelled."""
        leases = [*self._tasks, *self._answers.leases]
        if not leases:
            return
        lost_leases = await self._in_thread(self._queue.renew, leases, LEASE_S)
        self._answers.discard(set(lost_leases))
        for lost in lost_leases:
            if (task := self._tasks.get(lost)) is not None:
                task.cancel()
