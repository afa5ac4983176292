"""Requests of a batch are answered once each, whatever ends: a gateway, a refusal, a lease."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tandem.auth.principal import ANONYMOUS, Principal
from tandem.config.serving.batches import BatchesConfig
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.work import batch_worker as module
from tandem.gateway.work.batch_worker import BatchWorker
from tandem.gateway.work.room import ModelLoad, PoolLoad
from tandem.jobs.batches.answers import AnswerPlace, SegmentReader
from tandem.jobs.batches.stored import QUEUE, answers_folder, items_of
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

ROUTE = "/v1/completions"


class Engine:
    """Routes of models that repeat the prompt; counts what they are sent."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.tenants: set[str] = set()
        self.refusals: list[int] = []
        """Statuses of the next answers."""
        self.blocked = asyncio.Event()
        self.blocked.set()
        self.under_way = self.most_under_way = 0
        self.app = Starlette(routes=[Route(ROUTE, self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            self.calls[body["prompt"]] += 1
            self.bodies.append(body)
            self.tenants.add(principal_of(request.scope).tenant)
            await self.blocked.wait()
            await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        if self.refusals:
            return JSONResponse({"error": {}}, status_code=self.refusals.pop())
        return JSONResponse({"choices": [{"text": body["prompt"]}]}, headers={"x-request-id": "req-1"})


class Loads:
    """One base for all names but `unknown`."""

    def __init__(self, limit: int = 8) -> None:
        self.load = ModelLoad(limit=limit, running=0, waiting=0)

    async def learn(self, names: Iterable[str]) -> None:
        """Nothing to look up."""

    def __call__(self, name: str) -> PoolLoad | None:
        return None if name == "unknown" else PoolLoad(base="base", load=self.load)


@pytest.fixture
def store(tandem_home: Path, monkeypatch: pytest.MonkeyPatch) -> JobStore:
    for name, value in (("POLL_S", 0.01), ("IDLE_POLL_S", 0.05), ("REPORT_S", 0.02), ("FIRST_PAUSE_S", 0.01)):
        monkeypatch.setattr(module, name, value)
    return JobStore.open()


def submit(store: JobStore, tmp_path: Path, models: list[str], **options: Any) -> Job:
    """A batch with a request for each model."""
    path = tmp_path / "input.jsonl"
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": ROUTE, "body": {"model": model, "prompt": f"text {n}"}}
        for n, model in enumerate(models)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {"endpoint": ROUTE, "location": str(path)}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="batch", spec=spec, tenant="red", **options)).job
    with path.open("rb") as file:
        ItemQueue.open().add(list(items_of(job, file, 3)))
    return job


@pytest.fixture
async def start(store: JobStore) -> AsyncIterator[Callable[..., Any]]:
    """Starts workers; they are stopped at the end."""
    workers: list[BatchWorker] = []

    async def run(engine: Engine, loads: Loads | None = None, principal: Principal | None = ANONYMOUS) -> BatchWorker:
        worker = BatchWorker(
            ItemQueue.open(), engine.app, lambda key, tenant: principal, loads or Loads(), BatchesConfig(), "gateway"
        )
        workers.append(worker)
        await worker.start()
        return worker

    yield run
    for worker in workers:
        await worker.stop()


async def until_ended(job: Job) -> dict[State, int]:
    queue = ItemQueue.open()
    for _ in range(600):
        counts = queue.counts(job.id)
        if all(state.ended for state in counts):
            return counts
        await asyncio.sleep(0.05)
    raise AssertionError(f"not ended: {counts}")


def answers(job: Job) -> dict[str, Any]:
    """Lines of the answers by custom id."""
    reader = SegmentReader(answers_folder(job.id))
    lines = [
        json.loads(reader.read(AnswerPlace.parse(item.result_reference)))
        for item in ItemQueue.open().items(job.id)
        if item.result_reference is not None
    ]
    return {line["custom_id"]: line for line in lines}


async def test_each_request_is_sent_once_at_a_low_priority_and_its_answer_kept(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"] * 100), Engine()
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 100}
    assert set(engine.calls.values()) == {1} and engine.most_under_way <= 8
    assert all(body["priority"] == module.PRIORITY and body["stream"] is False for body in engine.bodies)
    found = answers(job)
    assert len(found) == 100
    assert all(found[f"id-{n}"]["response"]["body"]["choices"][0]["text"] == f"text {n}" for n in range(100))
    assert found["id-0"]["response"]["request_id"] == "req-1"


async def test_a_refusal_for_lack_of_room_is_no_answer(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"] * 5), Engine()
    engine.refusals = [429, 503, 429]
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 5}
    assert all(line["response"]["status_code"] == 200 for line in answers(job).values())


async def test_an_error_of_an_engine_is_tried_again_and_is_the_answer_at_last(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"]), Engine()
    engine.refusals = [500, 500, 500]
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 1}
    (line,) = answers(job).values()
    assert line["response"]["status_code"] == 500 and sum(engine.calls.values()) == 3


async def test_requests_of_a_gateway_that_ends_are_answered_by_another(
    store: JobStore, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, blocked, other = submit(store, tmp_path, ["m"] * 20), Engine(), Engine()
    monkeypatch.setattr(module, "LEASE_S", 1.0)
    blocked.blocked.clear()
    first = await start(blocked)
    while blocked.under_way < 8:
        await asyncio.sleep(0.02)
    await first.stop()
    await start(other)
    queue = ItemQueue.open()
    for _ in range(100):
        queue.reclaim()
        if all(state.ended for state in queue.counts(job.id)):
            break
        await asyncio.sleep(0.1)
    assert queue.counts(job.id) == {State.FINISHED: 20} and len(answers(job)) == 20
    assert set(other.calls.values()) == {1}


async def test_cancelled_requests_are_given_up(
    store: JobStore, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    job, engine = submit(store, tmp_path, ["m"] * 20), Engine()
    engine.blocked.clear()
    await start(engine)
    while engine.under_way < 8:
        await asyncio.sleep(0.02)
    store.cancel(job.id)
    while engine.under_way:
        await asyncio.sleep(0.02)
    assert await until_ended(job) == {State.CANCELLED: 20} and sum(engine.calls.values()) == 8


async def test_requests_of_a_key_that_has_ended_fail_and_are_not_sent(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"] * 3, key_id="key_000000000000"), Engine()
    await start(engine, principal=None)
    assert await until_ended(job) == {State.FAILED: 3} and not engine.calls


async def test_names_that_no_model_has_are_answered_by_the_gateway(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["unknown", "m"]), Engine()
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 2} and QUEUE == "batches"


async def test_few_adapters_of_a_base_are_used_at_once(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, [f"adapter-{n % 10}" for n in range(100)]), Engine()
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 100}
    order = [body["model"] for body in engine.bodies]
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes < 50, order
