"""Worker for batches at a gateway: claims requests from the queue, sends them through the gateway's own routes, reports answers.

Requests pass the same checks, admission, routing and usage records as a client's, at a lower priority. Answers are made durable
before they are reported. A gateway that dies leaves its requests to the others when its leases have run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.auth.principal import Principal
from tandem.config.serving.batches import BatchesConfig
from tandem.errors import TandemError
from tandem.gateway.errors import REQUEST_ID
from tandem.gateway.identity.authentication import PRINCIPAL
from tandem.gateway.work.room import BatchRoom, PoolLoad
from tandem.jobs.batches.answers import SegmentWriter, output_line
from tandem.jobs.batches.requests import InputFile, RequestPlace
from tandem.jobs.batches.stored import QUEUE, answers_folder
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Answer, Item, Lease
from tandem.tasks import stop

LEASE_S = 60.0
RENEW_S = 15.0
POLL_S, IDLE_POLL_S = 0.1, 2.0
"""Seconds between two claims while there is work, and while there is none."""
REPORT_S = 0.5
"""Seconds for which answers are collected, to be written together."""
PRIORITY = 1000
"""Priority of batches' requests: after a client's, who cannot give one below 0 without a right to."""
REQUEST_TIMEOUT_S = 1800.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Pauses before a request is sent again that was refused for lack of room."""
NO_ROOM = (429, 503)
"""Statuses of a request that was refused for lack of room or of a replica: it is sent again."""
MODELS_AT_ONCE = 2
"""Models of one base, adapters or itself, whose requests are under way together, unless more came before."""
CLAIMED_AT_ONCE = 64
REFUSED_AT_ONCE = 8
"""Requests that are claimed together for a name that no model has."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Loads(Protocol):
    """The loads of replicas by names of models."""

    async def learn(self, names: Iterable[str]) -> None:
        """Look up these names, and forget others."""

    def __call__(self, name: str) -> PoolLoad | None:
        """The load for a name; None: no such model is served here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answered:
    item: Item
    line: bytes | None = None
    error: str | None = None
    retryable: bool = True


class BatchWorker:
    """A background service of one gateway."""

    def __init__(
        self,
        queue: ItemQueue,
        app: ASGIApp,
        principal_of: Callable[[str, str], Principal | None],
        loads: Loads,
        config: BatchesConfig,
        name: str,
    ) -> None:
        """`app`: the routes of models, without authentication. `principal_of`: from key id and tenant to the caller; None: that
        key has ended.
        """
        self._queue = queue
        self._app = app
        self._principal_of = principal_of
        self._loads = loads
        self._config = config
        self._owner = f"{name}:{uuid.uuid4().hex[:8]}"
        # One thread each: a file is read at one place at a time.
        self._database_thread = ThreadPoolExecutor(1, thread_name_prefix="batch-database")
        self._input_thread = ThreadPoolExecutor(1, thread_name_prefix="batch-input")
        self._rooms: dict[str, BatchRoom] = defaultdict(lambda: BatchRoom(config.share))
        """By base model."""
        self._models: dict[str, int] = {}
        """Requests that wait in the queue, by model, at the last look."""
        self._looked_at = -IDLE_POLL_S
        self._tasks: dict[Lease, asyncio.Task[None]] = {}
        self._under_way: Counter[str] = Counter()
        """Requests by model."""
        self._answered: list[_Answered] = []
        self._segments: dict[str, SegmentWriter] = {}
        self._inputs: dict[str, InputFile] = {}
        self._services: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to claim."""
        if self._config.enabled:
            loops = ((self._claim, POLL_S), (self._report, REPORT_S), (self._renew, RENEW_S))
            self._services = [asyncio.create_task(self._repeat(work, pause_s)) for work, pause_s in loops]

    async def stop(self) -> None:
        """Stop claiming. Requests under way are given up, and another gateway sends them; answers that are there are reported."""
        for task in (*self._services, *self._tasks.values()):
            await stop(task)
        with contextlib.suppress(TandemError):
            await self._report()
        self._close_files()
        self._queue.close()
        for threads in (self._database_thread, self._input_thread):
            threads.shutdown(wait=False, cancel_futures=True)

    def _close_files(self) -> None:
        for files in (self._segments, self._inputs):
            while files:
                files.popitem()[1].close()

    async def _repeat(self, work: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            try:
                await work()
            except TandemError as error:
                # The database or the disk is away: later it may answer.
                log.warning("Batches: %s", error)
                await asyncio.sleep(IDLE_POLL_S)
            await asyncio.sleep(pause_s)

    async def _in_thread(self, work: Callable[..., T], *args: Any, **options: Any) -> T:
        """Work on the database, or on segments."""
        call = functools.partial(work, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._database_thread, call)

    # ---- claims ----

    async def _claim(self) -> None:
        """Claim what there is room for, of few models at once, and begin to send it."""
        now = time.monotonic()
        if now - self._looked_at >= IDLE_POLL_S:
            self._models, self._looked_at = await self._in_thread(self._queue.waiting_by_adapter, QUEUE), now
            await self._loads.learn({*self._models, *+self._under_way})
        for model in sorted(self._models, key=lambda model: -self._under_way[model]):
            if (room := self._room_for(model, now)) > 0:
                items = await self._in_thread(
                    self._queue.claim, QUEUE, self._owner, LEASE_S, limit=room, adapters=[model]
                )
                for item in items:
                    assert item.lease is not None
                    self._under_way[model] += 1
                    self._tasks[item.lease] = asyncio.create_task(self._send(item))
                if len(items) < room:
                    self._models.pop(model, None)

    def _room_for(self, model: str, now: float) -> int:
        pool = self._loads(model)
        if pool is None:
            # Its requests are answered with the gateway's 404.
            return REFUSED_AT_ONCE
        same_base = {
            name: count
            for name, count in self._under_way.items()
            if count and (found := self._loads(name)) and found.base == pool.base
        }
        if model not in same_base and len(same_base) >= MODELS_AT_ONCE:
            return 0  # adapters would be loaded back and forth
        room = self._rooms[pool.base].free(pool.load, sum(same_base.values()), now)
        return min(room, self._config.max_concurrent - self._under_way.total(), CLAIMED_AT_ONCE)

    def _base_of(self, model: str) -> str | None:
        pool = self._loads(model)
        return None if pool is None else pool.base

    # ---- requests ----

    async def _send(self, item: Item) -> None:
        """Send one request until it has an answer that is no refusal for lack of room."""
        try:
            answered = await self._answer(item)
        except TandemError as error:
            answered = _Answered(item=item, error=str(error), retryable=False)
        except Exception as error:
            log.exception("A request of the batch %s failed.", item.job)
            answered = _Answered(item=item, error=f"{type(error).__name__}: {error}")
        finally:
            self._under_way[item.adapter] -= 1
            self._tasks.pop(_lease(item), None)
        self._answered.append(answered)

    async def _answer(self, item: Item) -> _Answered:
        payload = item.payload or {}
        principal = self._principal_of(item.key_id, item.tenant)
        if principal is None:
            return _Answered(item=item, error=f"The API key {item.key_id} has ended.", retryable=False)
        body = await asyncio.get_running_loop().run_in_executor(self._input_thread, self._read, item)
        body |= {"priority": max(PRIORITY, _number(body.get("priority"))), "stream": False}
        pause_s = FIRST_PAUSE_S
        transport = httpx.ASGITransport(_AsCaller(self._app, principal), raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://gateway", timeout=REQUEST_TIMEOUT_S
        ) as client:
            while True:
                response = await client.post(payload["url"], json=body)
                if response.status_code not in NO_ROOM:
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        if response.status_code >= 500 and item.failures + 1 < item.max_attempts:
            return _Answered(item=item, error=f"status {response.status_code}: {response.text[:500]}")
        request_id = response.headers.get("x-request-id", "")
        line = output_line(item.id, payload["custom_id"], response.status_code, request_id, _json(response))
        return _Answered(item=item, line=line)

    def _read(self, item: Item) -> dict[str, Any]:
        assert item.job is not None and item.payload_reference is not None
        location = str((item.payload or {})["file"])
        if (file := self._inputs.get(location)) is None:
            file = self._inputs[location] = InputFile(location)
        return file.body(RequestPlace.parse(item.payload_reference))

    # ---- reports ----

    async def _report(self) -> None:
        """Write the answers since the last report, and report their places."""
        answered, self._answered = self._answered, []
        if not answered:
            if not self._tasks and not self._models:
                self._close_files()
            return
        try:
            await self._in_thread(self._write, answered)
        except TandemError:
            self._answered = [*answered, *self._answered]
            raise

    def _write(self, answered: Sequence[_Answered]) -> None:
        by_job: dict[str, list[_Answered]] = defaultdict(list)
        for one in answered:
            by_job[str(one.item.job)].append(one)
        reports = []
        for job, group in by_job.items():
            with_line = [one for one in group if one.line is not None]
            if with_line and job not in self._segments:
                self._segments[job] = SegmentWriter(answers_folder(job))
            places = (
                self._segments[job].append([one.line for one in with_line if one.line is not None]) if with_line else []
            )
            reports += [
                Answer(lease=_lease(one.item), result_reference=str(place))
                for one, place in zip(with_line, places, strict=True)
            ]
            reports += [
                Answer(lease=_lease(one.item), error=one.error, retryable=one.retryable)
                for one in group
                if one.line is None
            ]
        self._queue.report(reports)

    async def _renew(self) -> None:
        """Hold the requests under way, and those whose answers wait to be reported; end those that were cancelled."""
        leases = [*self._tasks, *(_lease(one.item) for one in self._answered)]
        if not leases:
            return
        for lost in await self._in_thread(self._queue.renew, leases, LEASE_S):
            if (task := self._tasks.get(lost)) is not None:
                task.cancel()


class _AsCaller:
    """The routes of models as one caller reaches them."""

    def __init__(self, app: ASGIApp, principal: Principal) -> None:
        self._app = app
        self._principal = principal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, PRINCIPAL: self._principal, REQUEST_ID: f"batch-{uuid.uuid4().hex}"}, receive, send)


def _lease(item: Item) -> Lease:
    assert item.lease is not None
    return item.lease


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": "The answer is not JSON.", "type": "server_error", "code": None, "param": None}}
