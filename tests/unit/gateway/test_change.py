"""Gateway during changes: another version of a model, a restarted directory, a model at zero replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from pydantic_core import from_json

from tandem.auth.principal import ANONYMOUS
from tandem.config import AutoscalingConfig, GatewayConfig, ServedModelConfig
from tandem.gateway.admission import control as admission
from tandem.gateway.admission import demand
from tandem.gateway.admission.control import Admission
from tandem.gateway.admission.demand import DemandReport
from tandem.gateway.admission.queue import SchedulingHints
from tandem.gateway.app import create_app
from tandem.gateway.dialect import dialect_of
from tandem.gateway.errors import ApiError, no_replica
from tandem.gateway.models.catalog import Catalog, ResolvedModel
from tandem.gateway.replicas.fleet import Fleet
from tandem.gateway.replicas.upstream import EngineRequest
from tandem.gateway.requests.request_hints import read_routing_request
from tandem.registry import Registry
from tandem.routing.records import ReplicaRecord, ServedModel, Snapshot
from tandem.routing.request import RoutingRequest

NEW = ServedModel(id="base@2", name="base", path="", config=ServedModelConfig(model="base", engine="vllm"))
FIRST = ReplicaRecord(id="first", pool="base@1", deployment="engine-base", url="http://a", token="t")
SECOND = replace(FIRST, id="second", pool="base@2")
ASK = RoutingRequest(pool="base@2")


@asynccontextmanager
async def following(*replicas: ReplicaRecord) -> AsyncIterator[Fleet]:
    async def watch(version: int) -> Snapshot:
        if version:
            await asyncio.sleep(60)
        return Snapshot(version=1, replicas=replicas)

    fleet = Fleet(watch, models=[NEW])
    await fleet.start()
    yield fleet
    await fleet.stop()


async def test_requests_go_to_the_other_version_until_a_replica_of_their_own_is_ready() -> None:
    async with following(FIRST) as fleet:
        found = fleet.choose(ASK, ())
        assert found == FIRST
        with fleet.counting(ASK, found):
            fleet.answered(ASK, found)
            assert fleet.requests_outside("base@2", ()) == 1 and fleet.requests_outside("base@2", (FIRST,)) == 0
        assert fleet.ready("base@2", suspects=True) == [FIRST] and not fleet.has_pool("base@2")
    async with following(FIRST, SECOND) as fleet:
        assert {fleet.choose(ASK, ()) for _ in range(20)} == {SECOND}
        assert fleet.choose(ASK, ("second",)) == FIRST


async def test_requests_pinned_to_a_version_get_no_other_version() -> None:
    async with following(FIRST) as fleet:
        assert fleet.choose(replace(ASK, pinned=True), ()) is None


async def test_a_requeued_request_backs_off_and_does_not_count_for_the_throughput(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission, "MAX_BACKOFF_S", 0.2)
    async with following(replace(FIRST, max_running=1)) as fleet:
        gate = Admission([NEW], fleet, GatewayConfig())
        gate.refresh()
        queue = gate.queue(NEW)
        slot = gate.slot(NEW, SchedulingHints(arrived=time.monotonic(), kind=3))
        assert await slot.acquire() == 0.0
        # Somebody waits all the time, so that the pace is measured.
        queue.throughput.waiting_began(time.monotonic())
        waits = [await slot.reacquire(no_replica("It is not there", 5)) for _ in range(5)]
        assert waits == [0.05, 0.1, 0.2, 0.2, 0.2] and queue.running == 1
        assert queue.throughput.answer_time_s(3) == 0.0 and queue.throughput.rate is None
        slot.release()
        assert queue.running == 0 and queue.throughput.answer_time_s(3) > 0.0


async def test_a_request_that_no_replica_took_within_hold_s_fails_and_frees_its_slot() -> None:
    brief = replace(NEW, config=replace(NEW.config, hold_s=0.0))
    async with following(FIRST) as fleet:
        gate = Admission([brief], fleet, GatewayConfig())
        gate.refresh()
        slot = gate.slot(brief, SchedulingHints(arrived=time.monotonic(), kind=3))
        await slot.acquire()
        with pytest.raises(ApiError, match="It is not there"):
            await slot.reacquire(no_replica("It is not there", 5))
        slot.release()
        assert gate.queue(brief).running == 0 and gate.queue(brief).throughput.answer_time_s(3) == 0.0


async def test_a_light_request_waits_for_no_generation_on_a_retry_either() -> None:
    async with following(replace(FIRST, max_running=1)) as fleet:
        gate = Admission([replace(NEW, config=replace(NEW.config, requests_per_replica=1))], fleet, GatewayConfig())
        gate.refresh()
        heavy, light = (
            gate.slot(NEW, SchedulingHints(arrived=0.0)),
            gate.slot(NEW, SchedulingHints(arrived=0.0), light=True),
        )
        await heavy.acquire()
        assert await light.acquire() == 0.0
        assert await asyncio.wait_for(light.reacquire(no_replica("It refused", 5)), 5) == admission.FIRST_BACKOFF_S
        assert gate.queue(NEW).running == 1


async def test_draining_replicas_of_the_other_version_are_not_used() -> None:
    async with following(replace(FIRST, state="draining")) as fleet:
        assert fleet.choose(ASK, ()) is None
        assert fleet.ready("base@2", suspects=True) == []


async def test_only_requests_that_name_a_version_or_an_adapter_are_pinned(tmp_path: Path) -> None:
    catalog = Catalog([NEW], Registry(f"sqlite:///{tmp_path}/tandem.db"))
    for name, pinned in (("base", False), ("base@2", True)):
        model = await catalog.resolve(name, ANONYMOUS)
        assert model.pinned == pinned and read_routing_request(model, {"prompt": "a"}, {}).pinned == pinned
    folder = ServedModel(
        id="plain", name="plain", path="/models/plain", config=ServedModelConfig(model="/models/plain", engine="vllm")
    )
    assert not (await Catalog([folder], Registry(f"sqlite:///{tmp_path}/tandem.db")).resolve("plain", ANONYMOUS)).pinned


def test_the_body_names_the_version_of_the_chosen_replica() -> None:
    request = EngineRequest(
        path="/v1/completions",
        body=b'{"model":"base@2","prompt":"a"}',
        model=ResolvedModel(base=NEW),
        headers={},
        dialect=dialect_of("/v1/completions"),
        routing=ASK,
        hints=SchedulingHints(arrived=0.0),
    )
    assert request.body_for("base@2") is request.body
    assert from_json(request.body_for("base@1")) == {"model": "base@1", "prompt": "a"}


async def test_a_new_gateway_waits_for_a_complete_snapshot_or_one_replica_of_each_model() -> None:
    told = [Snapshot(version=1, complete=False), Snapshot(version=2, replicas=(SECOND,), complete=False)]

    async def watch(version: int) -> Snapshot:
        await asyncio.sleep(0.01)
        return told.pop(0) if len(told) > 1 else told[0]

    fleet = Fleet(watch, models=[NEW])
    await fleet.start()
    assert fleet.choose(ASK, ()) == SECOND
    await fleet.stop()


SLEEPER = replace(
    NEW, config=ServedModelConfig(model="base", engine="vllm", autoscaling=AutoscalingConfig(min_replicas=0))
)


async def test_demand_of_scaling_models_is_reported_at_once_repeated_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demand, "CHECK_PERIOD_S", 0.01)
    monkeypatch.setattr(demand, "REPORT_PERIOD_S", 0.1)
    waiting: dict[str, int] = {}
    heard: list[dict[str, int]] = []

    async def report_demand(counts: dict[str, int]) -> None:
        heard.append(counts)
        if len(heard) == 1:
            raise ConnectionError("the directory is being replaced")

    fixed = replace(NEW, id="other@1", name="other")
    report = DemandReport([SLEEPER, fixed], lambda: waiting, report_demand)
    report.start()
    await asyncio.sleep(0.05)
    assert heard == []
    waiting.update({"base@2": 3, "other@1": 9})
    while len(heard) < 4:
        await asyncio.sleep(0.01)
    assert heard[-1] == {"engine-base": 3}
    waiting.clear()
    while heard[-1]:
        await asyncio.sleep(0.01)
    warnings = len(heard)
    await asyncio.sleep(0.15)
    assert len(heard) == warnings
    await report.stop()


async def test_health_is_ok_without_replicas_only_for_models_that_scale_to_zero(tmp_path: Path) -> None:
    async def watch(version: int) -> Snapshot:
        await asyncio.sleep(0.01)
        return Snapshot(version=1)

    for served, status in ((SLEEPER, 200), (NEW, 503)):
        app = create_app(models=[served], watch=watch, registry=Registry(f"sqlite:///{tmp_path}/tandem.db"))
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as http,
        ):
            health = await http.get("/health")
            assert (health.status_code, health.json()["ready_replicas"]) == (status, {"base": 0})
            assert [card["id"] for card in (await http.get("/v1/models")).json()["data"]] == ["base"]
