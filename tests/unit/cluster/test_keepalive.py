"""TCP keepalive of connections."""

from __future__ import annotations

import asyncio
import socket

from tandem.cluster.keepalive import keep_alive


async def test_a_connection_gets_probes_and_a_user_timeout() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    _, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    keep_alive(writer.transport, unreachable_s=15)
    sock = writer.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 15_000
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
    writer.close()
    server.close()


async def test_a_unix_socket_stays_as_it_is() -> None:
    left, right = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=left)
    keep_alive(writer.transport, unreachable_s=15)
    writer.close()
    right.close()
