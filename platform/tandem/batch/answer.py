"""Concurrent requests to one engine in an engine thread.

Requests go through the engine's own OpenAI app, called in this process: no socket, no bytes of HTTP, and everything that the
app takes and refuses is what the served app takes and refuses. Rows of any number of chunks share one window, so that the
engine has the next row waiting while the last rows of a chunk end.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic_core import to_json

from tandem.engine.asgi import Answer, post
from tandem.engine.protocol import AdapterRef, Engine
from tandem.engine.thread import EngineThread
from tandem.errors import AdapterError, EngineError, StorageError
from tandem.serve.replica.adapters import AdapterSlots

SLOT_WAIT_S = 7 * 24 * 3600.0
"""Nobody waits impatiently for a row: those of many adapters take turns."""
STOP_TIMEOUT_S = 30.0
"""Seconds that the engine may take to stop."""
STORE_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before an adapter's store is asked again that did not answer."""


class EngineDiedError(EngineError):
    """The engine died; its requests have no answers."""


class EngineRequest(NamedTuple):
    """A request for the engine."""

    path: str
    body: bytes
    adapter: AdapterRef | None


class EngineClient:
    """One engine and what it is asked. `answer` may be called by many threads at a time."""

    def __init__(
        self,
        engine: Engine,
        *,
        window_rows: int,
        max_adapters: int = 0,
        max_cached: int | None = None,
        prepare: Callable[[AdapterRef], AdapterRef] = lambda adapter: adapter,
        store_pauses_s: Sequence[float] = STORE_PAUSES_S,
    ) -> None:
        """`prepare` brings an adapter's files to this node and checks them."""
        self._store_pauses_s = store_pauses_s
        self._engine = engine
        self._window = asyncio.Semaphore(window_rows)
        self._slots = AdapterSlots(engine, max_adapters, cached=max_cached, prepare=prepare)
        self._stopped = asyncio.Event()
        self._thread = EngineThread(engine, self._wait_until_stopped)

    def start(self) -> None:
        """Load the model; raises EngineError with the reason if that cannot work."""
        self._thread.start().result()

    def answer(self, questions: Sequence[EngineRequest]) -> list[Answer]:
        """The answers, in the order of the questions.

        Raises a group with an EngineDiedError if the engine dies meanwhile, with a StorageError if an adapter's store is away.
        """
        return self._thread.submit(self._answer(questions)).result()

    def close(self) -> None:
        """Stop the engine."""
        self._thread.call(self._stopped.set)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self._thread.ended.result(STOP_TIMEOUT_S)

    async def _wait_until_stopped(self, ready: Callable[[], None]) -> None:
        ready()
        await self._stopped.wait()

    async def _answer(self, questions: Sequence[EngineRequest]) -> list[Answer]:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._ask(each)) for each in questions]
        return [task.result() for task in asked]

    async def _ask(self, question: EngineRequest) -> Answer:
        async with self._window:
            try:
                return await self._tried(question)
            except AdapterError as error:
                return refusal(400, str(error))
            except EngineError as error:
                if isinstance(error, EngineDiedError) or not self._engine.healthy:
                    raise EngineDiedError(str(error)) from error
                return refusal(500, str(error))

    async def _tried(self, question: EngineRequest) -> Answer:
        for pause_s in self._store_pauses_s:
            try:
                return await self._held(question)
            except StorageError:
                # A store or a disk that is away for a moment is no fault of the row's.
                await asyncio.sleep(pause_s)
        return await self._held(question)

    async def _held(self, question: EngineRequest) -> Answer:
        if question.adapter is None:
            return await self._post(question)
        async with self._slots.hold(question.adapter, SLOT_WAIT_S):
            return await self._post(question)

    async def _post(self, question: EngineRequest) -> Answer:
        try:
            answer = await post(self._engine.app, question.path, question.body)
        except Exception as error:  # noqa: BLE001 - an app raises again what it has answered with 500
            answer = refusal(500, f"{type(error).__name__}: {error}")
        # A dead engine makes its app say 500; the row is not to blame.
        if answer.status >= 500 and not self._engine.healthy:
            raise EngineDiedError(f"The engine died: {answer.body.decode(errors='replace')[:500]}")
        return answer


def refusal(status: int, message: str) -> Answer:
    """An answer of our own, in OpenAI's shape."""
    return Answer(status, to_json({"error": {"message": message, "code": None}}))
