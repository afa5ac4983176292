"""Listening addresses of replicas: the node's own address, and loopback too for a gateway's HTTP server.

Serve has one `http_options.host` for all: HAProxy's public listener on each node, and the HTTP server of each gateway behind
it. HAProxy reaches a gateway of its own node by 127.0.0.1 and those of other nodes by their addresses. A gateway that listened
where the public listener does (127.0.0.1, unless configured otherwise) could not be reached from another node, and one that
listened everywhere would be open on networks that no HAProxy uses (docs/adr/0024).

Between replicas Serve has a port of its own, guarded by Ray's token, on every interface (Ray 2.60); no option names its address.
Each of the two is opened by a function of Serve's, after a replica's constructor has returned, and that function is replaced
here. A Ray without it listens as it did before.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

LOOPBACK = "127.0.0.1"
BACKLOG = 2048
OPEN_PORT_FUNCTION = "add_port_to_grpc_server"
"""Serve's function that opens a replica's port."""
ALL_INTERFACES = "[::]:"
"""Start of an address that means all interfaces."""
StartedServer = tuple[asyncio.Task[None], uvicorn.Server]
StartServer = Callable[..., Awaitable[StartedServer]]


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen_on_node(node_address: str) -> None:
    """Have the HTTP server that Serve will start in this replica listen on loopback and on `node_address`, on one port."""
    from ray.serve._private import replica

    start = functools.partial(start_on, node_address, replica.start_asgi_http_server)  # type: ignore[attr-defined]
    replica.start_asgi_http_server = start  # type: ignore[attr-defined]


async def start_on(node_address: str, start: StartServer, app: Any, http_options: Any, **options: Any) -> StartedServer:
    """Start Serve's server on loopback, with a second socket on `node_address` where that is another address.

    RuntimeError, caused by the OSError, if the port is taken on either: Serve then tries the next one.
    """
    loopback_options = http_options.model_copy(update={"host": LOOPBACK})
    if node_address == LOOPBACK:
        return _without_proxy_headers(await start(app, loopback_options, **options))
    family = socket.AF_INET6 if ":" in node_address else socket.AF_INET
    node_socket = socket.socket(family, socket.SOCK_STREAM)
    try:
        node_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        node_socket.bind((node_address, http_options.port))
    except OSError as error:
        node_socket.close()
        raise RuntimeError(f"Port {http_options.port} is taken on {node_address}.") from error
    try:
        task, server = _without_proxy_headers(await start(app, loopback_options, **options))
    except BaseException:
        node_socket.close()
        raise
    # The task that Serve has made has not run yet: the server opens its sockets when it does.
    startup = server.startup

    async def startup_with_second(sockets: list[socket.socket] | None = None) -> None:
        node_socket.listen(BACKLOG)
        await startup(sockets=[*(sockets or []), node_socket])

    server.startup = startup_with_second  # type: ignore[method-assign]
    return task, server


def _without_proxy_headers(started: StartedServer) -> StartedServer:
    """Have a server that has not run yet report the peers of its connections.

    uvicorn believes X-Forwarded-For of any peer on loopback, and HAProxy passes on what its clients write there.
    """
    started[1].config.proxy_headers = False
    return started


def internal_port_on_node() -> None:
    """Have Serve open its port between replicas on the node's address alone; called in the constructor of each deployment."""
    import ray
    from ray.serve._private import replica

    open_ray_port = getattr(replica, OPEN_PORT_FUNCTION, None)
    if open_ray_port is None:
        return
    host = ray.util.get_node_ip_address()

    def open_port(server: Any, address: str) -> Any:
        where = f"[{host}]" if ":" in host else host
        return open_ray_port(
            server, f"{where}:{address.removeprefix(ALL_INTERFACES)}" if address.startswith(ALL_INTERFACES) else address
        )

    setattr(replica, OPEN_PORT_FUNCTION, open_port)
