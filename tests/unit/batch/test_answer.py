"""Many rows for one engine, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tandem.batch.answer import EngineClient, EngineDiedError, EngineRequest
from tandem.engine.echo.engine import EchoEngine
from tandem.engine.protocol import AdapterRef
from tandem.errors import AdapterError, EngineError, StorageError


class Watched(EchoEngine):
    """Counts how many requests it has at a time."""

    most = 0

    async def _answer(self, *args: Any, **options: Any) -> Any:
        self.most = max(self.most, self._running + 1)
        return await super()._answer(*args, **options)


def question(text: str, model: str = "echo", adapter: AdapterRef | None = None) -> EngineRequest:
    body = json.dumps({"model": model, "prompt": text}).encode()
    return EngineRequest("/v1/completions", body, adapter)


@pytest.fixture
def engine() -> Watched:
    return Watched(delay_s=0.01)


@pytest.fixture
def answerer(engine: Watched) -> Iterator[EngineClient]:
    def prepare(adapter: AdapterRef) -> AdapterRef:
        if adapter.path == "missing":
            raise AdapterError("it has no files")
        return adapter

    started = EngineClient(engine, window_rows=6, max_adapters=2, max_cached=2, prepare=prepare)
    started.start()
    yield started
    started.close()


def texts(answers: list[Any]) -> list[str]:
    return [json.loads(answer.body)["choices"][0]["text"] for answer in answers]


def test_answers_come_in_the_order_of_the_questions(answerer: EngineClient, engine: Watched) -> None:
    asked = [f"row {i} " + "and " * (i % 5) + "end" for i in range(40)]
    answers = answerer.answer([question(text) for text in asked])
    assert texts(answers) == [" ".join(text.split()) for text in asked]
    assert {answer.status for answer in answers} == {200}
    assert engine.most == 6


def test_pieces_share_one_window_so_that_the_engine_never_drains_between_them(
    answerer: EngineClient, engine: Watched
) -> None:
    fewest = []

    def watch() -> None:
        while not done.wait(0.002):
            fewest.append(engine.stats().running)

    done = threading.Event()
    # Rows of several lengths: those of one would all end at the same moment.
    asked = [question("word " * (2 + i % 4)) for i in range(8)]
    chunks = [threading.Thread(target=answerer.answer, args=(asked,)) for _ in range(6)]
    watcher = threading.Thread(target=watch)
    for thread in chunks:
        thread.start()
    while not engine.stats().running:
        time.sleep(0.001)
    watcher.start()
    # All but the last rows: then there is nothing left to fill the window with.
    chunks[0].join(timeout=10)
    done.set()
    for thread in (*chunks, watcher):
        thread.join(timeout=10)
    assert sum(count == 0 for count in fewest) <= max(1, len(fewest) // 20)


def test_rows_of_more_adapters_than_slots_take_turns(answerer: EngineClient, engine: Watched) -> None:
    adapters = [AdapterRef(id=f"a{i}@1", path=f"/a{i}") for i in range(5)]
    asked = [question("one two", adapter.id, adapter) for adapter in adapters * 4]
    answers = answerer.answer(asked)
    assert [json.loads(answer.body)["model"] for answer in answers] == [adapter.id for adapter in adapters * 4]


def test_a_refusal_is_an_answer_and_concerns_one_row(answerer: EngineClient) -> None:
    bad = AdapterRef(id="bad@1", path="missing")
    broken = AdapterRef(id="worse@1", path="/broken")
    asked = [question("fine"), question("x", "bad@1", bad), question("x", "worse@1", broken), question("x " * 2000)]
    answers = answerer.answer(asked)
    assert [answer.status for answer in answers] == [200, 400, 400, 400]
    assert b"it has no files" in answers[1].body and b"cannot be loaded" in answers[2].body


@pytest.mark.parametrize("failures", [2, 3])
def test_a_store_that_is_away_is_asked_again_and_is_not_the_rows_fault(engine: Watched, failures: int) -> None:
    asked = []

    def prepare(adapter: AdapterRef) -> AdapterRef:
        asked.append(adapter.id)
        if len(asked) <= failures:
            raise StorageError("s3://bucket/a cannot be read: away")
        return adapter

    answerer = EngineClient(engine, window_rows=6, max_adapters=1, prepare=prepare, store_pauses_s=(0.0, 0.0))
    answerer.start()
    try:
        wanted = [question("one two", "a@1", AdapterRef(id="a@1", path="s3://bucket/a")), question("x")]
        if failures == 2:
            assert texts(answerer.answer(wanted)) == ["one two", "x"]
        else:
            with pytest.raises(ExceptionGroup) as raised:
                answerer.answer(wanted)
            assert raised.group_contains(StorageError, match="away")
        assert asked == ["a@1"] * 3
    finally:
        answerer.close()


def test_an_engine_that_dies_is_not_the_rows_fault(answerer: EngineClient, engine: Watched) -> None:
    threading.Timer(0.05, engine.die).start()
    with pytest.raises(ExceptionGroup) as raised:
        for _ in range(100):
            answerer.answer([question("one two three")] * 8)
    assert raised.group_contains(EngineDiedError)


def test_a_model_that_cannot_be_loaded_says_why() -> None:
    class Broken(EchoEngine):
        async def start(self) -> None:
            await asyncio.sleep(0)
            raise EngineError("there are no weights")

    with pytest.raises(EngineError, match="there are no weights"):
        EngineClient(Broken(), window_rows=4).start()
