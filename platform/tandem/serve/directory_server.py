"""TCP server of the directory: takes reports of replicas, pushes changes to gateways, and answers them about limits.

Pushes are coalesced: a change of state reaches gateways within `URGENT_INTERVAL_S`, one of load or adapters within
`PUSH_INTERVAL_S`, together with all others of that time. Gateways at the same version share one encoded message. One that does
not read gets no more until it does, and then all that it has missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import ssl
import time
from collections.abc import Callable, Iterable
from typing import cast

from tandem.cluster.keepalive import keep_alive
from tandem.engine.protocol import AdapterRef
from tandem.limits import Answer, Exchange
from tandem.routing.changes import ReplicaChange
from tandem.routing.records import HeartbeatReply, base_of_pool
from tandem.serve import directory_protocol as protocol
from tandem.serve.app_tls import HANDSHAKE_S
from tandem.serve.directory_state import HEARTBEAT_S, DirectoryState, UnknownReplicaError, WaitingCounts
from tandem.tasks import stop

URGENT_INTERVAL_S = 0.1
"""Shortest time between two messages to a gateway, in seconds: replicas that join, leave or change their state."""
PUSH_INTERVAL_S = 0.25
"""Shortest time between two messages to a gateway about loads and adapters, which change all the time in a large fleet."""
HELLO_S = 5.0
"""Seconds within which a connection has to send the token."""
MAX_UNAUTHENTICATED = 2048
"""Connections that have not shown the token yet; of more the oldest is closed. Replicas and gateways show it at once, so that
those of a whole fleet that connects again are never the oldest for long."""
BACKLOG = 2048

log = logging.getLogger(__name__)


class DirectoryServer:
    """Connections of replicas and gateways to one directory; used in one event loop."""

    def __init__(
        self,
        state: DirectoryState,
        demand: WaitingCounts,
        complete: Callable[[], bool],
        apply_limits: Callable[[Exchange], Answer],
    ) -> None:
        """`complete`: whether the directory has been there for long enough to know all replicas.

        `apply_limits`: applies a gateway's exchange to the ledger of limits.
        """
        self.state = state
        self._apply_limits = apply_limits
        self._demand = demand
        self._is_complete = complete
        self._token = secrets.token_urlsafe(32)
        self._server: asyncio.Server | None = None
        self._peers: set[_Peer] = set()
        self._unauthenticated: dict[_Peer, None] = {}
        """Connections that have not sent the token, oldest first."""
        self._pins: dict[str, tuple[AdapterRef, ...]] = {}
        self._replies: dict[tuple[str, str], HeartbeatReply] = {}
        """The last answer for each pool and deployment."""
        self._push_timer: asyncio.TimerHandle | None = None
        self._push_is_urgent = False
        self._pushed_at = 0.0
        self._reports: list[tuple[_Peer, bytes]] = []
        """Reports that were received and are not applied yet."""
        self._tick_task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self, host: str, tls: ssl.SSLContext | None = None) -> protocol.DirectoryAddress:
        """Listen on a free port of `host`, an address of this node, with TLS if a context is given."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Peer(self),
            host,
            0,
            backlog=BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_S,
        )
        self._tick_task = asyncio.create_task(self._tick())
        port = self._server.sockets[0].getsockname()[1]
        return protocol.DirectoryAddress(host=host, port=port, token=self._token, tls=tls is not None)

    async def stop(self) -> None:
        """Close all connections."""
        await stop(self._tick_task)
        if self._server is not None:
            self._server.close()
        for peer in list(self._peers):
            peer.close()

    def set_pins(self, pins: dict[str, tuple[AdapterRef, ...]]) -> None:
        """Replace the pinned adapters, by base, and send them to replicas of bases whose pins changed."""
        if pins != self._pins:
            self._pins = pins
            self._answer_replicas(list(self._peers))

    def bases(self) -> set[str]:
        """Bases of the replicas that are known."""
        return {base_of_pool(pool) for pool in self.state.pools()}

    async def changed(self, timeout_s: float) -> None:
        """Wait for the next change of a replica, for at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def publish(self, *, urgent: bool = True) -> None:
        """Push changes to the gateways, now or as soon as the interval has passed since the last push."""
        if self._push_timer is not None and (self._push_is_urgent or not urgent):
            return
        if self._push_timer is not None:
            self._push_timer.cancel()
        loop = asyncio.get_running_loop()
        earliest_at = self._pushed_at + (URGENT_INTERVAL_S if urgent else PUSH_INTERVAL_S)
        self._push_timer, self._push_is_urgent = loop.call_at(max(earliest_at, loop.time()), self._push_all), urgent

    def has_token(self, hello: protocol.Hello) -> bool:
        """Whether a client has shown the directory's token."""
        return hmac.compare_digest(hello.token.encode(), self._token.encode())

    def peer_connected(self, peer: _Peer) -> None:
        """A connection was made."""
        self._peers.add(peer)
        self._unauthenticated[peer] = None
        if len(self._unauthenticated) > MAX_UNAUTHENTICATED:
            oldest = next(iter(self._unauthenticated))
            del self._unauthenticated[oldest]
            oldest.close()

    def peer_authenticated(self, peer: _Peer) -> None:
        """A connection has shown the token."""
        self._unauthenticated.pop(peer, None)

    def peer_disconnected(self, peer: _Peer) -> None:
        """A connection has ended. Its replica is not removed: it may come back, or else falls silent."""
        self._peers.discard(peer)
        self._unauthenticated.pop(peer, None)

    def frame_received(self, peer: _Peer, content: bytes) -> None:
        """A frame of a replica or gateway that has shown the token. ValueError if it cannot be read."""
        if peer.purpose == "limits":
            answer = self._apply_limits(protocol.decode_exchange(content))
            peer.send(protocol.frame(protocol.encode_answer(answer)))
            return
        if peer.purpose == "watch":
            if self.state.mark_silent(time.monotonic()):
                self.publish()
            return
        if content == protocol.LEAVE:
            self._apply_reports()
            if peer.replica is not None and self.state.remove(peer.replica):
                self.publish()
            peer.close()
            return
        self._reports.append((peer, content))
        if protocol.has_record(content):
            self._apply_reports()
            self.publish()
        else:
            self.publish(urgent=False)

    def _apply_reports(self) -> None:
        """Apply the reports that have arrived since the last time. Decoding them together takes a third of the time."""
        reports, self._reports = self._reports, []
        now = time.monotonic()
        for (peer, _), change in zip(
            reports, protocol.decode_changes([content for _, content in reports]), strict=True
        ):
            if change is None:
                peer.refuse("no report")
            else:
                self._apply(peer, change, now)

    def _apply(self, peer: _Peer, change: ReplicaChange, now: float) -> None:
        try:
            self.state.report(change, now)
        except UnknownReplicaError:
            peer.answer(HeartbeatReply(waiting=0, resend=True))
            return
        if peer.replica is None:
            peer.replica = change.id
        if peer.reply is None or peer.reply.resend:
            self._answer_replicas([peer])

    def welcome_gateway(self, peer: _Peer) -> None:
        """Send a gateway that has connected all changes since its version."""
        self.state.mark_silent(time.monotonic())
        self._send([peer])

    def _answer_replicas(self, peers: Iterable[_Peer]) -> None:
        """Send replicas their answers that differ from the last one."""
        now = time.monotonic()
        replies: dict[tuple[str, str], HeartbeatReply] = {}
        for peer in peers:
            pool_and_deployment = self.state.pool_and_deployment(peer.replica) if peer.replica is not None else None
            if pool_and_deployment is None:
                continue
            reply = replies.get(pool_and_deployment)
            if reply is None:
                pool, deployment = pool_and_deployment
                waiting = self._demand.total(deployment, now)
                reply = HeartbeatReply(waiting=waiting, pins=self._pins.get(base_of_pool(pool)))
                # An equal reply is the previous object, which `_Peer.answer` compares by identity first.
                previous = self._replies.get(pool_and_deployment)
                reply = replies[pool_and_deployment] = reply if previous != reply else previous
                self._replies[pool_and_deployment] = reply
            peer.answer(reply)

    def _push_all(self) -> None:
        self._push_timer = None
        self._apply_reports()
        self._pushed_at = asyncio.get_running_loop().time()
        self._changed.set()
        self._changed = asyncio.Event()
        self._send([peer for peer in self._peers if peer.purpose == "watch" and not peer.paused])

    def _send(self, gateways: Iterable[_Peer]) -> None:
        encoded: dict[tuple[int, int], bytes] = {}
        complete = self._is_complete()
        for peer in gateways:
            peer_version = (peer.epoch, peer.version)
            if peer_version not in encoded:
                update = self.state.changes_since(*peer_version, complete=complete)
                encoded[peer_version] = protocol.frame(protocol.encode_update(update))
            peer.send(encoded[peer_version])
            peer.epoch, peer.version = self.state.epoch, self.state.version

    async def _tick(self) -> None:
        """Each second, push to gateways without a recent message, and answer replicas."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                self._answer_replicas(list(self._peers))
                if self._push_timer is None:
                    self._push_all()
            except Exception:
                log.exception("The directory could not send what has changed; it tries again in %g s.", HEARTBEAT_S)


class _Peer(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: DirectoryServer) -> None:
        self._server = server
        self._frames = protocol.FrameReader(protocol.LONGEST_HELLO)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.purpose: protocol.Purpose | None = None
        """What the connection is for; None: its client has not shown the token yet."""
        self.paused = False
        """Whether the client reads too slowly, so that the write buffer is full."""
        self.epoch = self.version = 0
        """Of a gateway: epoch and version of the last update sent to it."""
        self.replica: str | None = None
        """Of a replica: its id."""
        self.reply: HeartbeatReply | None = None
        """Of a replica: the last answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        keep_alive(transport, unreachable_s=protocol.UNREACHABLE_S)
        self._deadline = asyncio.get_running_loop().call_later(HELLO_S, self.close)
        self._server.peer_connected(self)

    def connection_lost(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._server.peer_disconnected(self)

    def data_received(self, data: bytes) -> None:
        try:
            for content in self._frames.feed(data):
                if self.purpose is not None:
                    self._server.frame_received(self, content)
                elif not self._authenticate(protocol.decode_hello(content)):
                    return
        except (ValueError, protocol.ProtocolError) as error:
            self.refuse(type(error).__name__)

    def refuse(self, reason: str) -> None:
        """End the connection of a client that sends invalid frames; they may hold tokens, so only `reason` is logged."""
        log.warning("The directory closed a connection that sent what it cannot read (%s).", reason)
        self.close()

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._server.publish()

    def answer(self, reply: HeartbeatReply) -> None:
        """Send a replica its answer, unless it is the last one again."""
        if reply is not self.reply and reply != self.reply:
            self.reply = reply
            self.send(protocol.frame(protocol.encode_reply(reply)))

    def send(self, data: bytes) -> None:
        """Write a frame."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """End the connection once all written bytes are sent."""
        if self._transport is not None:
            self._transport.close()

    def _authenticate(self, hello: protocol.Hello) -> bool:
        if not self._server.has_token(hello):
            self.close()
            return False
        self._server.peer_authenticated(self)
        self.purpose = hello.purpose
        self._frames.limit = protocol.LONGEST_EXCHANGE if hello.purpose == "limits" else protocol.LONGEST_REPORT
        if self._deadline is not None:
            self._deadline.cancel()
        if hello.purpose == "watch":
            self.epoch, self.version = hello.epoch, hello.version
            self._server.welcome_gateway(self)
        return True
