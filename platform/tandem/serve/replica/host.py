"""Host of an engine: an engine thread with an HTTP server, a guard and adapter slots in front of the engine's app.

The methods here may be called from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tandem.engine.protocol import AdapterRef, Engine, EngineStats
from tandem.engine.thread import EngineThread
from tandem.serve.app_tls import HANDSHAKE_S
from tandem.serve.replica.adapters import AdapterSlots
from tandem.serve.replica.answer import RecordUsage
from tandem.serve.replica.guard import Guard

STOP_TIMEOUT_S = 10.0
"""Seconds that server and engine may take to stop once no request runs."""
MAX_CONNECTIONS = 4096
"""Connections of all gateways to one engine; each has one request. Engines generate hundreds at once, and the queue for more is
in the gateways."""
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
        record_usage: RecordUsage | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`on_change` is called from the engine's thread when adapters or health change, and `record_usage` when a request has
        ended (see Guard); `tls`: the server's context (`app_tls`), None: it speaks no TLS; for the others see AdapterSlots.
        """
        self.token = secrets.token_hex(32)
        self.url = ""
        """`http://host:port`, or `https://`, once started."""
        self._engine = engine
        self._host = host
        self._tls = tls
        self._slots = AdapterSlots(engine, max_adapters, on_change, cached=max_cached, prepare=prepare)
        self._guard = Guard(engine, self._slots, self.token, on_change, record_usage)
        self._thread = EngineThread(engine, self._serve)
        self._server: _Server | None = None

    async def start(self) -> None:
        """Start the thread and wait until the engine answers. Raises what the engine's start raised."""
        await asyncio.wrap_future(self._thread.start())

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
        self._thread.call(self._slots.set_pinned, tuple(adapters))

    @property
    def alive(self) -> bool:
        """Whether the engine can answer."""
        return self._thread.is_running and self._engine.healthy

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait up to `timeout_s` for running ones, then stop engine and server."""
        self._guard.draining = True
        if not self._thread.is_running:
            return
        with contextlib.suppress(Exception):
            await asyncio.wrap_future(self._thread.submit(self._stop(timeout_s)))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(self._thread.ended), STOP_TIMEOUT_S)

    async def _stop(self, timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._guard.in_flight and self._engine.healthy:
                    await asyncio.sleep(0.05)
        if self._server is not None:
            self._server.should_exit = True

    async def _serve(self, ready: Callable[[], None]) -> None:
        sock = socket.create_server((self._host, 0), backlog=2048)
        scheme = "http" if self._tls is None else "https"
        self.url = f"{scheme}://{self._host}:{sock.getsockname()[1]}"
        config = uvicorn.Config(
            self._guard,
            lifespan="auto",
            log_config=None,
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=5,
        )
        self._server = _Server(config, ready, self._tls)
        await self._server.serve(sockets=[sock])


class LimitedConnection(HttpToolsProtocol):
    """A connection to the engine's server; one above `MAX_CONNECTIONS` is ended at once."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's call at the start."""
        if len(self.connections) < MAX_CONNECTIONS:
            super().connection_made(transport)
            return
        self.transport = transport
        transport.abort()


class _Server(uvicorn.Server):
    """A uvicorn server outside the main thread: it has no signal handlers, and calls `ready` when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], tls: ssl.SSLContext | None) -> None:
        super().__init__(config)
        self._ready = ready
        self._tls = tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn has no limit for the time of a TLS handshake, so it is given no sockets to listen on.
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        for listening in sockets or ():
            server = await loop.create_server(
                self._new_connection,
                sock=listening,
                ssl=self._tls,
                ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_S,
                backlog=self.config.backlog,
            )
            self.servers.append(server)
        self._ready()

    def _new_connection(self) -> asyncio.Protocol:
        return LimitedConnection(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
