"""Native routes of jobs over HTTP: lists, changes, events, logs, metrics and the queue, by tenants and roles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from jobs_world import JobsWorld, jobs_world

from tandem.auth import KeyStore, Limits, Role
from tandem.jobs.work.states import JobKind
from tandem.observability.events import Evaluated, Step
from tandem.usage import UsageStore


@pytest.fixture
async def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JobsWorld]:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    async with jobs_world(tmp_path) as found:
        yield found


def streamed(text: str) -> list[tuple[str, Any]]:
    """Ids and data of server-sent events before the last one."""
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    events = [block for block in blocks if "data" in block]
    assert events.pop()["data"] == "[DONE]"
    return [(event["id"], json.loads(event["data"])) for event in events]


async def test_jobs_are_listed_newest_first_by_kind_state_and_parent_in_pages(jobs: JobsWorld) -> None:
    first, held = jobs.submit("first"), jobs.submit("held", held=True)
    child, sweep = jobs.submit("child", parent=first), jobs.submit("sweep", kind=JobKind.SWEEP)
    jobs.submit("theirs", tenant="other")

    async with jobs.http("user") as http:

        async def ids(query: str = "") -> list[str]:
            response = await http.get(f"/v1/tandem/jobs{query}")
            assert response.status_code == 200, response.text
            return [job["id"] for job in response.json()["data"]]

        assert await ids() == [sweep, child, held, first]
        assert await ids("?kind=sweep&kind=batch") == [sweep] and await ids("?state=held") == [held]
        assert await ids(f"?parent={first}") == [child]
        page = (await http.get("/v1/tandem/jobs?limit=3")).json()
        assert page["has_more"] and await ids(f"?after={page['last_id']}") == [first]
        refused = await http.get("/v1/tandem/jobs?state=finnished")
        assert refused.status_code == 400 and "Did you mean 'finished'?" in refused.json()["error"]["message"]
    async with jobs.http("admin") as http:
        assert len(await http_ids(http)) == 5 and len(await http_ids(http, "?tenant=other")) == 1


async def http_ids(http: Any, query: str = "") -> list[str]:
    return [job["id"] for job in (await http.get(f"/v1/tandem/jobs{query}")).json()["data"]]


async def test_jobs_of_another_tenant_do_not_exist(jobs: JobsWorld) -> None:
    job = jobs.submit()
    async with jobs.http("other") as http:
        for path in ("", "/events", "/logs", "/metrics", "/lineage"):
            response = await http.get(f"/v1/tandem/jobs/{job}{path}")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found"), path
        assert (await http.post(f"/v1/tandem/jobs/{job}/cancel")).status_code == 404
        # A filter by tenant is the admins'.
        assert await http_ids(http, "?tenant=lab") == []
    assert jobs.store.get(job).state == "queued"


async def test_a_change_needs_the_role_trainer_and_a_state_that_allows_it(jobs: JobsWorld) -> None:
    job = jobs.submit()

    async def change(key: str, action: str) -> tuple[int, Any]:
        async with jobs.http(key) as http:
            response = await http.post(f"/v1/tandem/jobs/{job}/{action}")
            return response.status_code, response.json().get("state") or response.json()["error"]["code"]

    assert await change("user", "cancel") == (403, "insufficient_permissions")
    assert await change("trainer", "hold") == (200, "held")
    assert await change("trainer", "pause") == (400, "illegal_state")
    assert await change("trainer", "release") == (200, "queued")
    assert await change("trainer", "pause") == (200, "paused")
    assert await change("trainer", "resume") == (200, "queued")
    assert await change("trainer", "cancel") == (200, "cancelled")
    assert await change("admin", "requeue") == (200, "queued")


async def test_a_tenant_has_so_many_streams_open_and_another_takes_the_place_of_one_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    async with jobs_world(tmp_path, max_job_streams=2) as jobs, jobs.http("user") as http, jobs.http("other") as others:
        job, theirs = jobs.submit(), jobs.submit(tenant="other")
        path = f"/v1/tandem/jobs/{job}/events?stream=true"
        async with http.stream("GET", path) as first, http.stream("GET", path) as second:
            # Both are kept: one that is dropped ends its response.
            lines = [each.aiter_lines() for each in (first, second)]
            assert [await anext(each) for each in lines] == [": stream", ": stream"]
            refused = await http.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
            assert int(refused.headers["retry-after"]) >= 5
            assert (await http.get(f"/v1/tandem/jobs/{job}/events")).status_code == 200
            async with others.stream("GET", f"/v1/tandem/jobs/{theirs}/events?stream=true") as stream:
                assert stream.status_code == 200
        async with asyncio.timeout(20):
            while True:
                async with http.stream("GET", path) as stream:
                    if stream.status_code == 200:
                        break
                await asyncio.sleep(0.05)


async def test_changes_of_jobs_count_as_requests_and_a_tenant_that_is_shut_off_makes_none(jobs: JobsWorld) -> None:
    keys = KeyStore.at(jobs.world.registry.address)
    for name, most in (("few", 2), ("off", 0)):
        limits = Limits(requests_per_minute=most)
        created = keys.create(name, tenant="lab", role=Role.TRAINER, limits=limits, by="test")
        jobs.keys[name] = created.secret
    job = jobs.submit()

    async def change(key: str, path: str) -> int:
        async with jobs.http(key) as http:
            return (await http.post(path, json={})).status_code

    while await change("few", "/v1/tandem/jobs/none/hold") == 401:
        await asyncio.sleep(0.1)
    assert await change("few", f"/v1/tandem/jobs/{job}/hold") == 200
    assert await change("few", f"/v1/tandem/jobs/{job}/release") == 429
    for path in ("/v1/batches", "/v1/batches/b/cancel", "/v1/fine_tuning/jobs", f"/v1/tandem/jobs/{job}/release"):
        while (status := await change("off", path)) == 401:
            await asyncio.sleep(0.1)
        assert status == 429
    assert jobs.store.get(job).state == "held"
    async with jobs.http("few") as http:
        assert (await http.get(f"/v1/tandem/jobs/{job}")).status_code == 200, "reads do not count"
    await jobs.world.app.state.files._accounting.usage.flush()
    rows = UsageStore.at(jobs.world.registry.address).sums(["tenant", "route"], tenant="lab")
    assert [(row["route"], row["requests"]) for row in rows] == [("/v1/tandem/jobs", 2)]


async def test_a_job_whose_file_is_gone_is_not_queued_again(jobs: JobsWorld) -> None:
    job = jobs.submit(spec={"files": ["file-gone"]})
    jobs.store.cancel(job)
    async with jobs.http("trainer") as http:
        response = await http.post(f"/v1/tandem/jobs/{job}/requeue")
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_file")
    assert jobs.store.get(job).state == "cancelled"


async def test_events_are_a_page_or_lines_or_a_stream_that_goes_on_after_an_id(jobs: JobsWorld) -> None:
    job = jobs.submit()
    _, lease = jobs.start(job)
    for step in range(1, 4):
        jobs.journal(job).write(Step(step=step, loss=float("nan")))
    jobs.store.finish(lease, {"model": "a@1"})
    path = f"/v1/tandem/jobs/{job}/events"
    async with jobs.http("user") as http:
        page = (await http.get(f"{path}?limit=2")).json()
        rest = (await http.get(f"{path}?after={page['last_id']}")).json()
        events = page["data"] + rest["data"]
        assert page["has_more"] and not rest["has_more"] and len(events) == 7
        assert [event["data"]["loss"] for event in events if event["event"] == "step"] == [None] * 3
        lines = await http.get(path, headers={"accept": "application/x-ndjson"})
        assert [json.loads(line) for line in lines.text.splitlines()] == events
        stream = streamed((await http.get(f"{path}?stream=true")).text)
        assert [data for _, data in stream] == events
        again = await http.get(f"{path}?stream=true", headers={"last-event-id": stream[4][0]})
        assert [data for _, data in streamed(again.text)] == events[5:]
        assert (await http.get(f"{path}?after=x")).status_code == 400


async def test_a_log_is_read_from_a_line_on_while_the_attempt_runs(jobs: JobsWorld) -> None:
    job = jobs.submit()
    path = f"/v1/tandem/jobs/{job}/logs"
    async with jobs.http("user") as http:
        assert (await http.get(path)).text == ""
        run, _ = jobs.start(job)
        jobs.logs.lines[run.run_name] = [f"line {number}" for number in range(1, 2501)]
        lines = [json.loads(line) for line in (await http.get(f"{path}?line=3")).text.splitlines()]
        assert len(lines) == 2498 and lines[0] == {"attempt": 1, "line": 3, "text": "line 3"}
        for query, status in (("?line=0", 400), ("?attempt=2", 404), ("?line=x", 400)):
            assert (await http.get(path + query)).status_code == status, query
        jobs.logs.is_away = True
        away = await http.get(path)
        assert (away.status_code, away.json()["error"]["code"]) == (503, "cluster_unavailable")


async def test_metrics_are_series_by_step(jobs: JobsWorld) -> None:
    job = jobs.submit()
    for step in (1, 2):
        jobs.journal(job).write(Step(step=step, loss=1.0 / step, learning_rate=0.1, tokens_per_s=10.0))
    jobs.journal(job).write(Evaluated(step=2, measured={"loss": 0.7}))
    async with jobs.http("user") as http:
        found = (await http.get(f"/v1/tandem/jobs/{job}/metrics?name=loss&name=evaluation_loss")).json()
        assert {each["name"]: each["values"] for each in found["series"]} == {
            "loss": [1.0, 0.5],
            "evaluation_loss": [0.7],
        }


async def test_the_queue_is_the_tenants_own_and_an_admins_is_that_of_all(jobs: JobsWorld) -> None:
    jobs.submit("a"), jobs.submit("b", tenant="other")
    for key, waiting in (("user", 1), ("admin", 2)):
        async with jobs.http(key) as http:
            queue = (await http.get("/v1/tandem/queue")).json()
            assert len(queue["waiting"]) == waiting and queue["oldest_waiting_s"] >= 0.0
