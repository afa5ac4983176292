"""The gateway's connections to its engines: a pool that can end all that lead to one of them."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ClientRequest
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace


class EngineConnector(aiohttp.TCPConnector):
    """As aiohttp's own. Whoever waits on a connection that is cut sees it break, as if the other end had gone."""

    def __init__(self) -> None:
        super().__init__(limit=0, keepalive_timeout=30.0)
        self._open: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()

    async def connect(self, req: ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout) -> Connection:
        """A connection for a request, new or from the pool."""
        connection = await super().connect(req, traces, timeout)
        if connection.transport is not None:
            self._open.add(connection.transport)
        return connection

    def abort_connections(self, url: str) -> int:
        """End every connection to the host and port of `url`, at once and without a word; how many there were."""
        address = urlsplit(url)
        found = [
            each
            for each in self._open
            if (each.get_extra_info("peername") or ())[:2] == (address.hostname, address.port)
        ]
        for transport in found:
            transport.abort()
        return len(found)
