"""Requests of a batch are answered once each, whatever ends: a gateway, a refusal, a lease."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tandem.api.bounded_json import BUDGET
from tandem.auth.principal import ANONYMOUS, Principal
from tandem.config.serving.batches import BatchesConfig
from tandem.gateway.identity.authentication import principal_of
from tandem.gateway.work import batch_sender, turns
from tandem.gateway.work import batch_worker as module
from tandem.gateway.work.batch_capacity import ModelLoad, PoolLoad
from tandem.gateway.work.batch_sender import BatchSender, PrincipalOf
from tandem.gateway.work.batch_worker import BatchWorker
from tandem.jobs.batches.answers import AnswerPlace, SegmentReader
from tandem.jobs.batches.requests import read_requests
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
        self.refusals: list[int] = []
        """Statuses of the next answers."""
        self.limited: dict[str, dict[str, str]] = {}
        """Headers of 429 for tenants that are at their limit."""
        self.order: list[str] = []
        """Tenants of the requests."""
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
            tenant = principal_of(request.scope).tenant
            self.order.append(tenant)
            await self.blocked.wait()
            await asyncio.sleep(0)
        finally:
            self.under_way -= 1
        if tenant in self.limited:
            return JSONResponse({"error": {"code": "limit"}}, status_code=429, headers=self.limited[tenant])
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
    for name, value in (("POLL_S", 0.01), ("IDLE_POLL_S", 0.05), ("REPORT_S", 0.02)):
        monkeypatch.setattr(module, name, value)
    for name, value in (("FIRST_PAUSE_S", 0.01), ("LONGEST_PAUSE_S", 0.1)):
        monkeypatch.setattr(batch_sender, name, value)
    return JobStore.open()


def submit(
    store: JobStore, tmp_path: Path, models: list[str], *, tenant: str = "red", prompt: Any = None, **options: Any
) -> Job:
    """A batch with a request for each model."""
    path = tmp_path / f"{tenant}.jsonl"
    lines = [
        {
            "custom_id": f"id-{n}",
            "method": "POST",
            "url": ROUTE,
            "body": {"model": model, "prompt": prompt or f"text {n}"},
        }
        for n, model in enumerate(models)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = {"endpoint": ROUTE, "location": str(path), **options.pop("spec", {})}
    job = store.submit(JobSubmission(kind=JobKind.BATCH, name="batch", spec=spec, tenant=tenant, **options)).job
    with path.open("rb") as file:
        ItemQueue.open().add(list(items_of(job, read_requests(file), 3)))
    return job


def of_tenant(key_id: str, tenant: str, models: tuple[str, ...]) -> Principal:
    """The caller of a request: anybody of the tenant."""
    return replace(ANONYMOUS, tenant=tenant)


@pytest.fixture
async def start(store: JobStore) -> AsyncIterator[Callable[..., Any]]:
    """Starts workers; they are stopped at the end."""
    workers: list[BatchWorker] = []

    async def run(engine: Engine, loads: Loads | None = None, principal_of: PrincipalOf = of_tenant) -> BatchWorker:
        sender = BatchSender(engine.app, principal_of, 2**20)
        worker = BatchWorker(ItemQueue.open(), sender, loads or Loads(), BatchesConfig(), "gateway")
        workers.append(worker)
        await worker.start()
        return worker

    yield run
    for worker in workers:
        if worker.is_running:
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
    assert all(body["priority"] == batch_sender.PRIORITY and body["stream"] is False for body in engine.bodies)
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
    monkeypatch.setattr(module, "LEASE_S", 60.0)
    await start(other)
    queue = ItemQueue.open()
    for _ in range(600):
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
    await start(engine, principal_of=lambda *_: None)
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


async def test_a_tenant_at_its_limit_holds_no_place_and_loses_no_attempt(
    store: JobStore, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_sender, "LONGEST_PAUSE_S", 60.0)
    limited = submit(store, tmp_path, ["m"] * 50, tenant="limited")
    other, engine = submit(store, tmp_path, ["m"] * 50, tenant="other"), Engine()
    engine.limited["limited"] = {"retry-after": "60"}
    await start(engine)
    assert await until_ended(other) == {State.FINISHED: 50}
    assert engine.order.count("limited") <= 8
    items = ItemQueue.open().items(limited.id)
    assert {(item.failures, item.attempt) for item in items} == {(0, 0)}
    assert {item.state for item in items} == {State.QUEUED}


async def test_a_refusal_that_is_final_is_the_answer(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"] * 3), Engine()
    engine.limited["red"] = {"retry-after": "3600", "x-should-retry": "false"}
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 3} and engine.order == ["red"] * 3
    assert {line["response"]["status_code"] for line in answers(job).values()} == {429}


async def test_tenants_of_a_model_take_turns(store: JobStore, start: Callable[..., Any], tmp_path: Path) -> None:
    large = submit(store, tmp_path, ["m"] * 200, tenant="a-large-one")
    small, engine = submit(store, tmp_path, ["m"] * 20, tenant="small"), Engine()
    await start(engine)
    assert await until_ended(small) == {State.FINISHED: 20}
    assert await until_ended(large) == {State.FINISHED: 200}
    assert engine.order.index("small") < 16
    assert len(engine.order) - engine.order[::-1].index("small") < 120, "the last one of the small batch"


async def test_every_adapter_gets_a_turn_while_others_have_work(
    store: JobStore, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN_S", 0.05)
    job, engine = submit(store, tmp_path, ["a"] * 200 + ["b"] * 200 + ["c"] * 5), Engine()
    await start(engine)
    assert await until_ended(job) == {State.FINISHED: 405}
    models = [body["model"] for body in engine.bodies]
    assert models.index("c") < 300


async def test_answers_of_one_batch_that_cannot_be_written_delay_no_other_and_are_kept(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    broken = submit(store, tmp_path, ["m"] * 100, tenant="broken")
    folder = answers_folder(broken.id)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder)  # an error that says nothing of space or rights
    other, engine = submit(store, tmp_path, ["m"] * 50, tenant="other"), Engine()
    await start(engine)
    assert await until_ended(other) == {State.FINISHED: 50}
    assert engine.order.count("broken") <= 30, "no more is computed than can be written"
    folder.unlink()
    assert await until_ended(broken) == {State.FINISHED: 100}
    assert len(answers(broken)) == 100 and set(Counter(engine.order).values()) == {50, 100}


async def test_answers_of_a_cancelled_batch_that_cannot_be_written_are_forgotten(
    store: JobStore, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    broken, engine = submit(store, tmp_path, ["m"] * 5), Engine()
    folder = answers_folder(broken.id)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(folder)
    await start(engine)
    while len(engine.order) < 5:
        await asyncio.sleep(0.02)
    store.cancel(broken.id)
    # Of the same tenant, of which nothing is claimed while answers cannot be written.
    other = submit(store, tmp_path, ["m"] * 5)
    assert await until_ended(other) == {State.FINISHED: 5}


async def test_nothing_is_claimed_while_many_bytes_of_answers_wait_to_be_written(
    store: JobStore, start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_UNREPORTED_BYTES", 100)
    monkeypatch.setattr(module, "REPORT_S", 0.5)
    job, engine = submit(store, tmp_path, ["m"] * 40), Engine()
    await start(engine)
    await asyncio.sleep(0.4)
    assert len(engine.order) <= 8
    assert await until_ended(job) == {State.FINISHED: 40}


async def test_a_request_larger_than_the_gateway_takes_is_answered_without_being_sent(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    large = submit(store, tmp_path, ["m"], tenant="large", prompt="x" * 2**20)
    many, engine = submit(store, tmp_path, ["m"], tenant="many", prompt=[{}] * (BUDGET // 5)), Engine()
    await start(engine)
    for job in (large, many):
        assert await until_ended(job) == {State.FINISHED: 1}
        (line,) = answers(job).values()
        assert line["response"]["status_code"] == 413 and line["response"]["body"]["error"]["message"]
    assert not engine.order


async def test_a_file_that_cannot_be_read_now_costs_no_attempt(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"] * 3), Engine()
    away = (tmp_path / "red.jsonl").rename(tmp_path / "away")
    await start(engine)
    await asyncio.sleep(0.5)
    items = ItemQueue.open().items(job.id)
    assert {item.failures for item in items} == {0} and not any(item.state.ended for item in items)
    away.rename(tmp_path / "red.jsonl")
    assert await until_ended(job) == {State.FINISHED: 3}


async def test_the_models_that_a_token_allowed_hold_for_its_batch(
    store: JobStore, start: Callable[..., Any], tmp_path: Path
) -> None:
    job, engine = submit(store, tmp_path, ["m"] * 2, spec={"models": ["m", "n"]}, key_id="oidc:user"), Engine()
    asked: set[Any] = set()

    def principal_of(*call: Any) -> Principal:
        asked.add(call)
        return ANONYMOUS

    await start(engine, principal_of=principal_of)
    assert await until_ended(job) == {State.FINISHED: 2}
    assert asked == {("oidc:user", "red", ("m", "n"))}
