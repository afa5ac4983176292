"""TCP keepalive and user time-out: the kernel ends connections whose other side is out of reach.

A process that ends closes its connections, but a broken network sends nothing: without keepalive a stream would wait for its
reader's own time-out.
"""

from __future__ import annotations

import asyncio
import socket

PROBES = 3
"""Unanswered probes after which a connection ends, where no user time-out decides."""


def keep_alive(transport: asyncio.BaseTransport, *, unreachable_s: int) -> None:
    """End the connection once the other machine has acknowledged nothing for `unreachable_s`: neither data nor probes.

    Probes are sent while a connection is idle, three in that time. Connections that are not TCP stay as they are.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    every_s = max(1, unreachable_s // PROBES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * unreachable_s)
