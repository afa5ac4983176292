"""Engine thread: runs an engine in a thread with an event loop of its own (uvloop), for replicas and for batch workers.

In a Serve replica's own event loop vLLM's app reached 0.79 of a bare server's throughput, in its own thread 1.0 (docs/adr/0001).
The engine is used in that thread's loop only; the methods here may be called from any other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from tandem.engine.protocol import Engine
from tandem.errors import EngineError

T = TypeVar("T")


class EngineThread:
    """One engine and its event loop."""

    def __init__(self, engine: Engine, work: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """`work` runs in the loop once the engine has started. It calls its argument when requests may come; when it returns,
        the engine stops and the thread ends.
        """
        self._engine = engine
        self._work = work
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()

    def start(self) -> concurrent.futures.Future[None]:
        """Start the thread. The future ends when requests may come, with the exception of a start that failed."""
        threading.Thread(target=self._run, name="tandem-engine", daemon=True).start()
        return self._ready

    @property
    def is_running(self) -> bool:
        """Whether the engine has started and requests may come."""
        return self._ready.done() and self._ready.exception() is None and not self._ended.done()

    @property
    def ended(self) -> concurrent.futures.Future[None]:
        """Done when the engine has stopped."""
        return self._ended

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine in the loop; EngineError before the thread starts, RuntimeError after the loop has closed."""
        if self._loop is None:
            coroutine.close()
            raise EngineError("The engine has not been started.")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function in the loop; nothing happens before the thread starts and after it has ended."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                self._loop.call_soon_threadsafe(function, *args)

    def _run(self) -> None:
        try:
            uvloop.run(self._main())
        except BaseException as error:  # noqa: BLE001 - handed to the caller of `start`
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            if not self._ready.done():
                self._ready.set_exception(EngineError("The engine ended before it took requests."))
            self._ended.set_result(None)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._engine.start()
            # Objects loaded by now stay: a full collection over torch, Ray and vLLM paused every stream for half a second.
            gc.collect()
            gc.freeze()
            await self._work(lambda: self._ready.set_result(None))
        finally:
            await self._engine.drain(0.0)
