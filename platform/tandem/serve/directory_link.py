"""Connections of replicas and gateways to the directory, whose address they ask Ray for, again after each connection."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from tandem.cluster.keepalive import keep_alive
from tandem.limits import Answer, Exchange
from tandem.routing.changes import ReplicaChange, Update, difference, normalised
from tandem.routing.records import HeartbeatReply, ReplicaRecord
from tandem.serve import directory_protocol as protocol
from tandem.serve.app_tls import APP_NAME, ClientTls
from tandem.serve.directory_state import HEARTBEAT_S
from tandem.tasks import discard, stop

Locate = Callable[[], Awaitable[protocol.DirectoryAddress]]
"""Returns the directory's present address."""

CONNECT_TIMEOUT_S = 5.0
"""Seconds to find the directory and connect to it."""
SILENT_S = 5.0
"""Seconds without a message, of which there is one each second, after which a gateway connects again."""
RETRY_S = 0.5
"""Mean seconds between two attempts to connect; drawn at random, since all clients of a directory lose it at once."""
LEAVE_S = 2.0
"""Seconds that a stopping replica takes at most to leave the directory."""
MIN_REPORT_INTERVAL_S = 0.1
"""Shortest time between two reports of a replica, in seconds."""


class Connection(asyncio.Protocol):
    """One connection to the directory: frames in, frames out."""

    def __init__(self, limit: int) -> None:
        self._frames = protocol.FrameReader(limit)
        self._received: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._transport: asyncio.Transport | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's call at the start."""
        self._transport = cast(asyncio.Transport, transport)
        self.open = True
        keep_alive(transport, unreachable_s=protocol.UNREACHABLE_S)

    def data_received(self, data: bytes) -> None:
        """asyncio's call for received bytes."""
        try:
            for content in self._frames.feed(data):
                self._received.put_nowait(content)
        except protocol.ProtocolError:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's call at the end."""
        self.open = False
        self._received.put_nowait(None)

    async def read(self, timeout_s: float | None = None) -> bytes:
        """The next frame; ConnectionError at the end, TimeoutError if there is none within `timeout_s`."""
        async with asyncio.timeout(timeout_s):
            content = await self._received.get()
        if content is None:
            raise ConnectionError("The directory has closed the connection.")
        return content

    def send(self, content: bytes) -> None:
        """Write a frame; ConnectionError if the connection has ended."""
        if self._transport is None or not self.open:
            raise ConnectionError("The connection to the directory has ended.")
        self._transport.write(protocol.frame(content))

    def close(self) -> None:
        """End the connection once all written bytes are sent."""
        if self._transport is not None:
            self._transport.close()


@dataclass(frozen=True, slots=True)
class DirectoryClient:
    """Makes connections of one process to the directory."""

    locate: Locate
    tls: ClientTls | None = None
    """For a directory that speaks TLS."""

    async def connect(self, hello: Callable[[str], protocol.Hello], limit: int) -> Connection:
        """A connection on which the hello (made from the token) was sent; `limit`: longest frame that is read, in bytes.

        Raises what Ray or the network raise.
        """
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            address = await self.locate()
            context = None
            if address.tls:
                if self.tls is None:
                    raise ConnectionError("The directory speaks TLS, and this process has no certificate.")
                context = await self.tls()
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: Connection(limit),
                address.host,
                address.port,
                ssl=context,
                server_hostname=APP_NAME if context else None,
            )
        connection.send(protocol.encode_hello(hello(address.token)))
        return connection


class ReplicaReporter:
    """Reports one replica to the directory: its record once for each connection, then changes, at least every second."""

    def __init__(
        self,
        client: DirectoryClient,
        record: Callable[[], ReplicaRecord],
        on_reply: Callable[[HeartbeatReply], None] = lambda reply: None,
    ) -> None:
        """`record` returns the replica's present record; `on_reply` is called with each answer that differs from the last."""
        self._client = client
        self._record = record
        self._on_reply = on_reply
        self._changed = asyncio.Event()
        self._connection: Connection | None = None
        self._sent_record: ReplicaRecord | None = None
        self._acknowledged = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.reply = HeartbeatReply(waiting=0)
        """The directory's last answer."""

    async def start(self, timeout_s: float) -> None:
        """Begin to report; returns when the directory knows the replica, or after `timeout_s`."""
        self._task = asyncio.create_task(self._report_loop())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._acknowledged.wait(), timeout_s)

    @property
    def running(self) -> bool:
        """Whether it reports."""
        return self._task is not None and not self._task.done()

    def changed(self) -> None:
        """Report soon: the record has changed. Called in the reporter's event loop."""
        self._changed.set()

    def report(self) -> None:
        """Report changes now; without a connection, the next one begins with the whole record."""
        if self._connection is not None:
            with contextlib.suppress(ConnectionError):
                self._send(self._connection)

    async def leave(self) -> None:
        """Stop reporting, and have the replica removed."""
        await stop(self._task)
        # On a new connection if there is none: a replica that does not leave would count as lost.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(LEAVE_S), self._connected() as connection:
                self._sent_record = None
                self._send(connection)
                connection.send(protocol.LEAVE)
                while True:
                    await connection.read()

    async def _report_loop(self) -> None:
        while True:
            # A directory that is being replaced does not answer; the next connection reaches the new one.
            with contextlib.suppress(Exception):
                async with self._connected() as connection:
                    await self._report_changes(connection)
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        connection = await self._client.connect(lambda token: protocol.Hello(token=token), protocol.LONGEST_REPORT)
        self._sent_record = None
        self._connection = connection
        try:
            yield connection
        finally:
            self._connection = None
            connection.close()

    async def _report_changes(self, connection: Connection) -> None:
        read_task = asyncio.create_task(self._read(connection))
        try:
            while not read_task.done():
                self._changed.clear()
                self._send(connection)
                # Loads and evictions of one moment are reported together.
                await asyncio.sleep(MIN_REPORT_INTERVAL_S)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S - MIN_REPORT_INTERVAL_S)
        finally:
            await discard(read_task)

    def _send(self, connection: Connection) -> None:
        record, sent_record = normalised(self._record()), self._sent_record
        change = ReplicaChange(id=record.id, record=record) if sent_record is None else difference(sent_record, record)
        connection.send(protocol.encode_change(change))
        self._sent_record = record

    async def _read(self, connection: Connection) -> None:
        while True:
            reply = protocol.decode_reply(await connection.read())
            if reply.resend:
                self._sent_record = None
                self._changed.set()
                continue
            self.reply = reply
            self._acknowledged.set()
            self._on_reply(reply)


class DirectoryWatcher:
    """Updates of the directory for one gateway (`gateway.replicas.fleet.WatchReplicas`)."""

    def __init__(self, client: DirectoryClient) -> None:
        self._client = client
        self._connection: Connection | None = None
        self._epoch = self._version = 0
        self._pinged_at = 0.0
        self.received_bytes = 0
        """Bytes of all updates so far."""

    async def __call__(self, version: int) -> Update:
        """The next update. `version`: that of the gateway's copy; for 0, or any other than the last, a snapshot is fetched.

        Raises what Ray or the network raise; the next call connects again.
        """
        try:
            if version != self._version:
                self.close()
                self._epoch = self._version = 0
            if self._connection is None:
                self._connection = await self._client.connect(self._hello, protocol.LONGEST_PUSH)
            self._ping(self._connection)
            content = await self._connection.read(SILENT_S)
            update = protocol.decode_update(content)
        except BaseException:
            self.close()
            raise
        self.received_bytes += len(content)
        self._epoch, self._version = update.epoch, update.version
        return update

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _hello(self, token: str) -> protocol.Hello:
        return protocol.Hello(token=token, purpose="watch", epoch=self._epoch, version=self._version)

    def _ping(self, connection: Connection) -> None:
        # Without pings the directory takes itself for unreachable, see DirectoryState.mark_silent.
        if time.monotonic() - self._pinged_at >= HEARTBEAT_S / 2:
            self._pinged_at = time.monotonic()
            connection.send(protocol.PING)


class LimitsLink:
    """Exchanges of one gateway with the shared ledger of limits (`gateway.accounting.limiter.ApplyLimits`), one at a time.

    On a connection of its own: a snapshot of a large fleet would delay the answers.
    """

    def __init__(self, client: DirectoryClient) -> None:
        self._client = client
        self._connection: Connection | None = None

    async def __call__(self, exchange: Exchange) -> Answer:
        """The ledger's answer. Raises what Ray or the network raise; the next call connects again."""
        try:
            if self._connection is None or not self._connection.open:
                self._connection = await self._client.connect(
                    lambda token: protocol.Hello(token=token, purpose="limits"), protocol.LONGEST_EXCHANGE
                )
            self._connection.send(protocol.encode_exchange(exchange))
            return protocol.decode_answer(await self._connection.read())
        except BaseException:
            # Also if the caller does not wait any longer: a late answer would be taken for that to the next exchange.
            self.close()
            raise

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
