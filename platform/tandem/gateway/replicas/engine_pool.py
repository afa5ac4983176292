"""Pool of connections to engines: the gateway's HTTP client for them (docs/adr/0033)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import defaultdict
from collections.abc import Callable, Mapping
from urllib.parse import SplitResult, urlsplit

from tandem.gateway.replicas.engine_http import EngineAnswer, EngineConnection, NotConnectedError
from tandem.serve.app_tls import APP_NAME, ClientTls

KEEP_ALIVE_S = 30.0
"""Seconds for which an idle connection to a replica is kept."""


class EngineConnections:
    """The connections to all replicas. Used in one event loop."""

    def __init__(self, connect_timeout_s: float, tls: ClientTls | None = None) -> None:
        """`tls`: for replicas whose URL has the scheme https."""
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._idle: defaultdict[str, list[EngineConnection]] = defaultdict(list)
        self._open: defaultdict[str, set[EngineConnection]] = defaultdict(set)
        self._clean_timer: asyncio.TimerHandle | None = None

    async def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes = b"",
        *,
        silent_s: float,
        on_sent: Callable[[], None] = lambda: None,
    ) -> EngineAnswer:
        """Send a request to a replica's `url`; the answer's head is still to be read.

        `silent_s`: seconds without a byte after which reading fails; `on_sent` is called once all is written. Raises
        NotConnectedError.
        """
        address = urlsplit(url)
        lines = [f"{method} {address.path or '/'} HTTP/1.1", f"host: {address.netloc}", f"content-length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise ValueError("A header for an engine has a line break in it.")
        connection = self._take_idle(address.netloc)
        if connection is None:
            connection = await self._connect(address)
        answer = await connection.send(f"{head}\r\n\r\n".encode(), body, silent_s)
        on_sent()
        return answer

    def abort(self, url: str) -> int:
        """Abort every connection to the host and port of `url`; returns their number."""
        connections = list(self._open.get(urlsplit(url).netloc, ()))
        for connection in connections:
            connection.abort()
        return len(connections)

    def close(self) -> None:
        """Abort all connections."""
        for connections in list(self._open.values()):
            for connection in list(connections):
                connection.abort()
        if self._clean_timer is not None:
            self._clean_timer.cancel()

    def _take_idle(self, netloc: str) -> EngineConnection | None:
        idle = self._idle.get(netloc)
        while idle:
            connection = idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, address: SplitResult) -> EngineConnection:
        netloc = address.netloc

        def release(connection: EngineConnection) -> None:
            if connection.is_open and connection.answer is None:
                connection.idle_since = asyncio.get_running_loop().time()
                self._idle[netloc].append(connection)
                self._clean_later()
            elif not connection.is_open:
                self._forget(netloc, connection)

        try:
            async with asyncio.timeout(self._connect_timeout_s):
                context = await self._context(address.scheme)
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: EngineConnection(release),
                    str(address.hostname),
                    int(address.port or 80),
                    ssl=context,
                    server_hostname=APP_NAME if context else None,
                )
        except (OSError, TimeoutError) as error:  # an SSLError is an OSError
            raise NotConnectedError(str(error) or f"no connection within {self._connect_timeout_s:g} s") from error
        # One that has ended already was forgotten by its `release`.
        if connection.is_open:
            self._open[netloc].add(connection)
        return connection

    async def _context(self, scheme: str) -> ssl.SSLContext | None:
        if scheme != "https":
            return None
        if self._tls is None:
            raise NotConnectedError("it speaks TLS, and this gateway has no certificate")
        try:
            return await self._tls()
        except TimeoutError:
            raise
        except Exception as error:  # what Ray raises where the directory does not answer
            raise NotConnectedError(f"no certificate from the directory: {error}") from error

    def _forget(self, netloc: str, connection: EngineConnection) -> None:
        with contextlib.suppress(ValueError):
            self._idle[netloc].remove(connection)
        self._open[netloc].discard(connection)
        for table in (self._idle, self._open):
            if not table[netloc]:
                del table[netloc]

    def _clean_later(self) -> None:
        if self._clean_timer is None:
            self._clean_timer = asyncio.get_running_loop().call_later(KEEP_ALIVE_S / 2, self._clean)

    def _clean(self) -> None:
        """End connections that have been idle for long."""
        self._clean_timer = None
        idle_before = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        for connections in list(self._idle.values()):
            for connection in [candidate for candidate in connections if candidate.idle_since < idle_before]:
                connections.remove(connection)
                connection.abort()
        if any(self._idle.values()):
            self._clean_later()
