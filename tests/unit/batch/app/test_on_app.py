"""Batch runs through a real gateway with an echo engine: each row is asked once, whatever ends in between."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from gateway_world import World, running
from starlette.requests import Request
from starlette.responses import Response

import tandem
from tandem.batch.app import input_file
from tandem.batch.app import run as module
from tandem.batch.app.prepare import prepare_on_app
from tandem.batch.app.run import AppRun
from tandem.batch.output.write import Output
from tandem.batch.progress import Progress, Summary
from tandem.config import BatchConfig, FilesConfig
from tandem.config.serving.batches import BatchesConfig
from tandem.engine.echo.engine import EchoEngine
from tandem.errors import ConfigError, JobError, UnknownModelError
from tandem.files.checks.batch import MAX_MODELS
from tandem.files.content import ContentStore
from tandem.files.store import FileStore
from tandem.jobs.batches import model_checks
from tandem.jobs.batches import runner as batch_runner
from tandem.jobs.batches.model_checks import ModelChecks
from tandem.jobs.batches.stored import RUNNER
from tandem.jobs.dispatch.decisions import Capacity
from tandem.jobs.dispatch.dispatcher import Dispatcher
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.registry import conditions
from tandem.sdk.batch_api import OpenAIBatches


class Counting(EchoEngine):
    """Counts prompts; answers wait while `open` is not set, but for the first `free` ones."""

    def __init__(self) -> None:
        super().__init__(("base@1", "base"))
        self.asked: Counter[str] = Counter()
        self.open = asyncio.Event()
        self.open.set()
        self.free = 0

    async def _completions(self, request: Request) -> Response:
        self.asked[(await request.json())["prompt"]] += 1
        if self.asked.total() > self.free:
            await self.open.wait()
        return await super()._completions(request)


class App:
    """A gateway, its dispatcher of batches, and runs that go through it."""

    def __init__(self, world: World, engine: Counting, store: JobStore) -> None:
        self.world, self.engine, self.store = world, engine, store
        self.url = f"{str(world.http.base_url).rstrip('/')}/v1"

    def config(self, rows: list[Any], **changes: Any) -> BatchConfig:
        path = self.world.folder / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        values = {"input": str(path), "model": "base", "output": str(self.world.folder / "out"), "on_app": True}
        return BatchConfig(**{**values, **changes})

    async def run(self, config: BatchConfig) -> Summary:
        return await asyncio.to_thread(tandem.run_batch, config, api_url=self.url, api_key="x")

    async def start(self, config: BatchConfig, api: OpenAIBatches, tell: Callable[[Progress], None]) -> Summary:
        """A start that does not cancel its batches when it ends, as one that is killed."""
        return await asyncio.to_thread(lambda: AppRun(prepare_on_app(config, api), api, tell, poll_s=0.05).answer())

    def batches(self) -> list[State]:
        return [job.state for job in self.store.page(limit=100).jobs]

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.world.folder / "out" / name).read_text().splitlines()]


@pytest.fixture
async def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[App]:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(batch_runner, "POLL_S", 0.05)
    monkeypatch.setattr(model_checks, "SETTLE", timedelta(0))
    monkeypatch.setattr(module, "POLL_S", 0.05)
    stop, files_config = threading.Event(), FilesConfig(location=str(tmp_path / "files"))
    async with running(tmp_path, files=files_config) as world:
        engine, address = Counting(), world.registry.address
        await world.add_engine(engine)
        store = JobStore.at(address)
        contents = ContentStore.open(world.registry.identity, files_config.location)
        batches = batch_runner.BatchRunner(
            store,
            ItemQueue.at(address),
            ModelChecks.at(address),
            FileStore.at(address),
            contents,
            tenant_bytes=2**30,
            max_attempts=3,
        )
        dispatcher = Dispatcher(store, {RUNNER: batches}, lambda: Capacity(cpus=1))
        thread = threading.Thread(target=dispatcher.run, args=(stop,), kwargs={"poll_s": 0.05})
        thread.start()
        try:
            yield App(world, engine, store)
        finally:
            engine.open.set()
            stop.set()
            await asyncio.to_thread(thread.join)
            dispatcher.close()


def prompts(count: int) -> list[Any]:
    return [{"custom_id": "same", "prompt": f"row {number}"} for number in range(count)]


async def test_more_models_than_one_batch_may_name_are_asked_and_unknown_ones_fail_their_own_rows_alone(
    app: App,
) -> None:
    rows: list[Any] = [{"prompt": "a b"}, *({"prompt": "c", "model": f"nobody-{n}"} for n in range(MAX_MODELS + 1))]
    summary = await app.run(app.config(rows))
    assert (summary.answered, summary.failed) == (1, MAX_MODELS + 1)
    assert {line["error"]["code"] for line in app.lines("errors.jsonl")} == {404}


async def test_rows_of_several_routes_are_answered_in_the_order_and_shape_of_a_run_with_engines(app: App) -> None:
    rows: list[Any] = [
        {"prompt": "a b"},
        {"custom_id": "mine", "messages": [{"role": "user", "content": "c d"}]},
        "{bad",
        {"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {"prompt": "e", "max_tokens": 5}},
        {"prompt": "f", "model": "nobody"},
        {"url": "/v1/score", "body": {"text_1": "a", "text_2": "b"}},
        {"prompt": "word " * 2000},
    ]
    summary = await app.run(app.config(rows, request={"max_tokens": 3}))
    assert (summary.rows, summary.answered, summary.failed, summary.found) == (7, 3, 4, 0)
    results, errors = app.lines("results.jsonl"), app.lines("errors.jsonl")
    assert [(line["row"], line["custom_id"], line.get("text")) for line in results] == [
        (0, "row-0", "a b"), (1, "mine", results[1]["text"]), (3, "7", None),
    ]  # fmt: skip
    assert "c d" in results[1]["text"]
    for line in results:
        assert list(line)[-2:] == ["response", "error"] and line["error"] is None
        assert line["response"]["status_code"] == 200
        assert line["response"]["request_id"] == line["response"]["body"]["id"]
    assert [list(line) for line in errors] == [["row", "custom_id", "where", "error", "input"]] * 4
    assert [(line["row"], line["error"]["code"]) for line in errors] == [(2, 400), (4, 404), (5, 400), (6, 413)]
    assert "no route of an app's batches" in errors[2]["error"]["message"]
    assert errors[3]["input"] == rows[6] and str(app.world.folder / "rows.jsonl") in errors[3]["where"]
    assert Counter(app.batches()) == {State.FINISHED: 2, State.FAILED: 1}, "one for each route and model"
    # Given again, nothing is sent.
    again = await app.run(app.config(rows, request={"max_tokens": 3}))
    assert (again.answered, again.failed, again.found) == (3, 4, 7) and len(app.batches()) == 3
    assert not (app.world.folder / "out" / "run" / "pieces").exists()
    assert json.loads((app.world.folder / "out" / "run" / "manifest.json").read_text())["app_batches"] == []


async def test_more_rows_than_a_batch_takes_are_several_batches(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_file, "MAX_REQUESTS", 5)
    summary = await app.run(app.config(prompts(23), rows_per_piece=2))
    assert summary.answered == 23 and [line["row"] for line in app.lines("results.jsonl")] == list(range(23))
    assert len(app.batches()) == 6 and set(app.engine.asked.values()) == {1}
    # The app keeps no files of a run that is done, but for inputs that their jobs still hold.
    kept = FileStore.at(app.world.registry.address).page("default", limit=100)
    assert {file.purpose.value for file in kept} <= {"batch"}


async def test_an_interrupted_run_cancels_its_batches_and_keeps_what_they_answered(
    app: App, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = app.config(prompts(40), rows_per_piece=8)
    app.engine.open.clear()
    app.engine.free = 10
    look = AppRun._say

    def interrupt(self: AppRun, *args: Any) -> None:
        look(self, *args)
        if sum(batch.request_counts.completed for batch in self._under_way.values()) >= 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AppRun, "_say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            await app.run(config)
    assert "the same command asks the other rows" in " ".join(capsys.readouterr().out.split())
    app.engine.open.set()
    asked_before = app.engine.asked.copy()
    summary = await app.run(config)
    assert summary.answered == 40 and [line["row"] for line in app.lines("results.jsonl")] == list(range(40))
    assert sorted(app.batches()) == sorted([State.CANCELLED, State.FINISHED])
    # The ten that were answered were not asked again; those that were under way were given up.
    twice = [prompt for prompt, count in app.engine.asked.items() if count > 1]
    assert len(twice) <= asked_before.total() - 10 and max(app.engine.asked.values()) <= 2


class Killed(BaseException):
    """Ends a start at once."""


class DiesAfterCreation(OpenAIBatches):
    """Is killed when the app has created the batch, before its id is heard."""

    def create(self, file_id: str, endpoint: str, idempotency_key: str) -> str:
        super().create(file_id, endpoint, idempotency_key)
        raise Killed


async def test_a_start_that_was_killed_between_creation_and_record_sends_nothing_twice(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = app.config(prompts(30), rows_per_piece=7)
    with DiesAfterCreation(app.url, "x") as api, pytest.raises(Killed):
        await app.start(config, api, lambda progress: None)
    # Also long after, when the app has forgotten the keys of uploads.
    monkeypatch.setattr(conditions, "RETENTION_S", 0)
    summary = await app.run(config)
    assert summary.answered == 30 and app.batches() == [State.FINISHED]
    assert len(app.engine.asked) == 30 and set(app.engine.asked.values()) == {1}


async def test_a_start_that_was_killed_while_it_followed_or_published_goes_on(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = app.config(prompts(30), rows_per_piece=7)
    publish, published = Output.publish, list[str]()

    def publish_two(self: Output, name: str, lines: Any) -> None:
        if len(published) == 2:
            raise Killed
        published.append(name)
        publish(self, name, lines)

    def kill(progress: Progress) -> None:
        if progress.done:
            raise Killed

    with OpenAIBatches(app.url, "x") as api:
        with pytest.raises(Killed):
            await app.start(config, api, kill)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Output, "publish", publish_two)
            await app.start(config, api, lambda progress: None)
    summary = await app.run(config)
    assert (summary.answered, summary.found) == (30, 14) and app.batches() == [State.FINISHED]
    assert set(app.engine.asked.values()) == {1}


async def test_a_batch_that_somebody_else_cancels_ends_the_run_with_its_answers_kept(app: App) -> None:
    config = app.config(prompts(12))
    app.engine.open.clear()
    app.engine.free = 4

    def cancel(progress: Progress) -> None:
        if progress.done >= 4:
            for job in app.store.page(limit=10).jobs:
                app.store.cancel(job.id)

    with OpenAIBatches(app.url, "x") as api, pytest.raises(JobError, match="Somebody cancelled the batch"):
        await app.start(config, api, cancel)
    app.engine.open.set()
    summary = await app.run(config)
    assert (summary.answered, summary.found) == (12, 4)
    assert [app.engine.asked[f"row {number}"] for number in range(4)] == [1] * 4


async def test_what_does_not_fit_is_refused_before_anything_is_sent(app: App) -> None:
    for name, value in (("engine_args", {"max_model_len": 8}), ("replicas", 2), ("window_rows", 8), ("engine", "echo")):
        with pytest.raises(ConfigError, match=f"{name} cannot be set with on_app"):
            app.config(prompts(1), **{name: value})
    with pytest.raises(ConfigError, match="at most 50,000"):
        await app.run(app.config(prompts(1), rows_per_piece=50_001))
    with pytest.raises(UnknownModelError, match="bsae"):
        await app.run(app.config(prompts(1), model="bsae"))
    with pytest.raises(ConfigError, match="Add --on-app"):
        tandem.run_batch(app.config(prompts(1), on_app=False), api_url=app.url)
    assert app.batches() == []
    await app.run(app.config(prompts(1)))
    with pytest.raises(ConfigError, match="on_app = True, and this one False"):
        tandem.run_batch(app.config(prompts(1), on_app=False))


async def test_an_app_without_batches_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    async with running(tmp_path, batches=BatchesConfig(enabled=False)) as world:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
        config = BatchConfig(input=str(tmp_path / "rows.jsonl"), model="base", output=str(tmp_path / "o"), on_app=True)
        url = f"{str(world.http.base_url).rstrip('/')}/v1"
        with pytest.raises(ConfigError, match="gateway.batches.enabled"):
            await asyncio.to_thread(tandem.run_batch, config, api_url=url, api_key="x")
