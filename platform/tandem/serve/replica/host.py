"""Host of an engine: runs it and its HTTP server in a thread with an event loop of its own (uvloop).

In a Serve replica's own event loop vLLM's app reached 0.79 of a bare server's throughput, in its own thread 1.0 (docs/adr/0001).
The engine is used in that thread's loop only; the methods here may be called from any other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import secrets
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import uvicorn
import uvloop

from tandem.engine.protocol import AdapterRef, Engine, EngineStats
from tandem.errors import EngineError
from tandem.serve.replica.adapters import AdapterSlots
from tandem.serve.replica.guard import Guard

T = TypeVar("T")

KEEP_ALIVE_S = 75
"""Longer than a gateway keeps an idle connection, so that it is the gateway that closes."""


class EngineHost:
    """One engine behind its guard, on a free port of `host`."""

    def __init__(
        self,
        engine: Engine,
        *,
        max_adapters: int,
        max_cached: int | None = None,
        prepare: Callable[[AdapterRef], AdapterRef] = lambda adapter: adapter,
        host: str = "127.0.0.1",
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called from the engine's thread when adapters or health change; for the others see AdapterSlots."""
        self.token = secrets.token_hex(32)
        self.url = ""
        """`http://host:port`, once started."""
        self._engine = engine
        self._host = host
        self._slots = AdapterSlots(engine, max_adapters, on_change, cached=max_cached, prepare=prepare)
        self._guard = Guard(engine, self._slots, self.token, on_change)
        self._ready: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: _Server | None = None

    async def start(self) -> None:
        """Start the thread and wait until the engine answers. Raises what the engine's start raised."""
        threading.Thread(target=self._run, name="tandem-engine", daemon=True).start()
        await asyncio.wrap_future(self._ready)

    def stats(self) -> EngineStats:
        """The engine's load and adapters."""
        return self._engine.stats()

    @property
    def waiting(self) -> int:
        """Requests that wait for an adapter slot and have not reached the engine."""
        return self._slots.waiting

    @property
    def in_slots(self) -> tuple[str, ...]:
        """Adapters in the engine's slots."""
        return self._slots.in_slots

    @property
    def adapter_loads(self) -> int:
        """Adapter loads since the start."""
        return self._slots.loads

    @property
    def pin_problems(self) -> tuple[tuple[str, str], ...]:
        """Pinned adapters that are not loaded, each with the reason."""
        return tuple(self._slots.problems.items())

    def set_pinned(self, adapters: Iterable[AdapterRef]) -> None:
        """Replace the pinned adapters."""
        if self._loop is not None and not self._ended.done():
            self._loop.call_soon_threadsafe(self._slots.set_pinned, tuple(adapters))

    @property
    def alive(self) -> bool:
        """Whether the engine can answer."""
        return self._ready.done() and not self._ended.done() and self._engine.stats().healthy

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait up to `timeout_s` for running ones, then stop engine and server."""
        self._guard.draining = True
        if self._loop is None or self._ended.done():
            return
        with contextlib.suppress(Exception):
            await self._in_loop(self._stop(timeout_s))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(self._ended), 10.0)

    async def _stop(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._guard.in_flight and self._engine.stats().healthy:
                    await asyncio.sleep(0.05)
        if self._server is not None:
            self._server.should_exit = True

    async def _in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            raise EngineError("The engine has not been started.")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _run(self) -> None:
        try:
            uvloop.run(self._main())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the start
            if not self._ready.done():
                self._ready.set_exception(error)
        finally:
            self._ended.set_result(None)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._engine.start()
        # Objects loaded by now stay: a full collection over torch, Ray and vLLM paused every stream for half a second.
        gc.collect()
        gc.freeze()
        try:
            sock = socket.create_server((self._host, 0), backlog=2048)
            self.url = f"http://{self._host}:{sock.getsockname()[1]}"
            config = uvicorn.Config(
                self._guard,
                lifespan="auto",
                log_config=None,
                access_log=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=5,
            )
            self._server = _Server(config, self._ready)
            await self._server.serve(sockets=[sock])
        finally:
            await self._engine.drain(0.0)


class _Server(uvicorn.Server):
    """A uvicorn server outside the main thread: no signal handlers, and it says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: concurrent.futures.Future[None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set_result(None)
