"""Clients of jobs and `tandem jobs` against a gateway over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from jobs_world import JobsWorld, jobs_world
from typer.testing import CliRunner

import tandem
from tandem.api import jobs as wire
from tandem.cli.main import app
from tandem.errors import ClusterError, ConfigError, IllegalTransitionError, UnknownJobError, UnknownLogError
from tandem.gateway.routes.openapi.jobs import job_paths
from tandem.jobs.work.states import ENDED, JobKind, State
from tandem.observability.events import Step
from tandem.sdk.jobs import requests


@pytest.fixture
async def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[JobsWorld]:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    async with jobs_world(tmp_path) as found:
        yield found


def client_of(jobs: JobsWorld, key: str = "trainer") -> tandem.Client:
    return tandem.Client(jobs.url, api_key=jobs.keys[key])


def test_the_wire_has_every_kind_and_state() -> None:
    assert set(get_args(wire.JobKind)) == {kind.value for kind in JobKind}
    assert set(get_args(wire.JobState)) == {state.value for state in State}
    assert {state.value for state in ENDED} == wire.ENDED_STATES


def test_every_request_of_the_clients_is_in_the_openapi_document() -> None:
    page = requests.page_request(kinds=["train"], states=["held"], parent="p", tenant="t", after="a", limit=1)
    sent = [
        page, requests.job_request("j"), requests.events_request("j", "1.0"), requests.event_stream_request("j", "1.0"),
        requests.log_request("j", 1, 1, follow=True), requests.metrics_request("j", ["loss"], 1),
        requests.lineage_request("j"), requests.queue_request("t"), requests.capacity_request("t"),
        requests.usage_request(["model"], since=None, until=None, tenant="t", offset=0),
        *(requests.action_request("j", action) for action in get_args(wire.JobAction)),
    ]  # fmt: skip
    paths = job_paths()
    described = set()
    for request in sent:
        path = "/v1" + re.sub("/jobs/j(?=/|$)", "/jobs/{job_id}", request.path)
        described.add(path)
        parameters = {each["name"] for each in paths[path][request.method]["parameters"]}
        assert set(request.query) <= parameters, path
    assert described == set(paths)


async def test_jobs_are_listed_over_pages_shown_and_changed(jobs: JobsWorld) -> None:
    ids = [jobs.submit(f"job{number}") for number in range(103)]

    def use() -> None:
        with client_of(jobs) as client:
            assert [job.id for job in client.jobs.list()] == ids[::-1]
            assert list(client.jobs.list(kinds=["sweep"], states=["queued", "held"])) == []
            job = client.jobs.get(ids[0])
            assert isinstance(job, wire.TandemJob) and (job.state, job.tenant) == ("queued", "lab")
            assert client.jobs.pause(job.id).state == "paused" and client.jobs.resume(job.id).state == "queued"
            assert client.jobs.hold(job.id).state == "held" and client.jobs.release(job.id).state == "queued"
            assert client.jobs.cancel(job.id).state == "cancelled" and client.jobs.requeue(job.id).state == "queued"
            assert client.jobs.queue().waiting[0].id == ids[0] and client.jobs.lineage(job.id).children == []

    await asyncio.to_thread(use)


async def test_what_goes_wrong_is_a_tandem_error(jobs: JobsWorld) -> None:
    job = jobs.submit()

    def use() -> None:
        with client_of(jobs, "user") as client:
            with pytest.raises(UnknownJobError, match="There is no job 'none'"):
                client.jobs.get("none")
            with pytest.raises(UnknownLogError, match="has no attempt 3"):
                list(client.jobs.logs(job, attempt=3))
            with pytest.raises(ConfigError, match="refused the key.*need the role trainer"):
                client.jobs.cancel(job)
        with client_of(jobs) as client, pytest.raises(IllegalTransitionError, match="'requeue' is not possible"):
            client.jobs.requeue(job)
        with tandem.Client("http://127.0.0.1:9", api_key="x") as client, pytest.raises(ClusterError, match="No server"):
            client.jobs.get(job)

    await asyncio.to_thread(use)


async def test_events_and_log_are_followed_until_the_job_ends(jobs: JobsWorld) -> None:
    job = jobs.submit()
    run, lease = jobs.start(job)
    jobs.logs.lines[run.run_name] = ["one\u2028 line"]

    def follow() -> tuple[list[wire.TandemJobEvent], list[wire.TandemLogLine]]:
        with client_of(jobs, "user") as client:
            return list(client.jobs.events(job, follow=True)), list(client.jobs.logs(job, follow=True))

    async def follow_async() -> list[str]:
        async with tandem.AsyncClient(jobs.url, api_key=jobs.keys["user"]) as client:
            names = [event.event async for event in client.jobs.events(job, follow=True)]
            assert (await client.jobs.get(job)).state == "finished"
            assert [each.text async for each in client.jobs.logs(job, line=2)] == ["two"]
            assert (await client.jobs.metrics(job, names=["loss"])).series[0].values == [2.0]
            return names

    following, following_async = asyncio.create_task(asyncio.to_thread(follow)), asyncio.create_task(follow_async())
    await asyncio.sleep(0.5)
    jobs.journal(job).write(Step(step=1, loss=2.0))
    jobs.logs.lines[run.run_name].append("two")
    jobs.store.finish(lease, {"model": "a@1"})
    events, lines = await following
    assert sorted(event.event for event in events) == ["state", "state", "state", "state", "step"]
    assert [line.text for line in lines] == ["one\u2028 line", "two"]
    assert sorted(await following_async) == sorted(event.event for event in events)

    def go_on() -> list[wire.TandemJobEvent]:
        with client_of(jobs, "user") as client:
            return list(client.jobs.events(job, after=events[1].id))

    assert await asyncio.to_thread(go_on) == events[2:]


async def test_a_log_is_followed_across_a_time_in_which_its_cluster_does_not_answer(jobs: JobsWorld) -> None:
    job = jobs.submit()
    run, lease = jobs.start(job)
    jobs.logs.lines[run.run_name] = ["one"]
    lines: list[str] = []

    def follow() -> None:
        with client_of(jobs) as client:
            lines.extend(each.text for each in client.jobs.logs(job, follow=True))

    following = asyncio.create_task(asyncio.to_thread(follow))
    await asyncio.sleep(0.5)
    jobs.logs.is_away = True
    await asyncio.sleep(1.5)
    jobs.logs.lines[run.run_name].append("two")
    jobs.logs.is_away = False
    jobs.store.finish(lease)
    await following
    assert lines == ["one", "two"]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobsWorld]:
    """The gateway in a thread: commands handle signals, which the main thread alone can."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    loop, world = asyncio.new_event_loop(), jobs_world(tmp_path)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield asyncio.run_coroutine_threadsafe(world.__aenter__(), loop).result(60)
    asyncio.run_coroutine_threadsafe(world.__aexit__(None, None, None), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_commands_need_nothing_but_url_and_key(served: JobsWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = served
    job = jobs.submit("mine")
    run, lease = jobs.start(job)
    jobs.logs.lines[run.run_name] = ["[bold]as it is[/]"]
    jobs.journal(job).write(Step(step=1, loss=2.0))
    monkeypatch.setenv("TANDEM_API_URL", jobs.url)
    monkeypatch.setenv("TANDEM_API_KEY", jobs.keys["trainer"])
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["jobs", *arguments])
        assert result.exit_code == status, result.output
        return result.output

    assert job in command("ls") and "no such job" in command("ls", "--state", "held")
    found: list[dict[str, Any]] = json.loads(command("ls", "--json"))
    assert [each["id"] for each in found] == [job]
    assert "running" in command("show", job)
    assert command("logs", job) == "[bold]as it is[/]\n"
    assert "loss=2" in command("events", job) and "loss" in command("metrics", job)
    assert "train" in command("queue")
    assert "is pausing" in command("pause", job)
    jobs.store.stopped(lease)
    assert "is queued" in command("resume", job) and "is cancelled" in command("cancel", job)
    assert "There is no job 'none'" in command("show", "none", status=1)
