"""Listening addresses of a gateway's server: loopback and its node's address, on one port."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions

from tandem.cluster.ports import free_ports
from tandem.serve.listen import start_on

NODE = "127.0.0.9"
"""All of 127.0.0.0/8 is this machine's, so it stands for the address of a node."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    told = scope["client" if scope["path"] == "/peer" else "server"]
    await send({"type": "http.response.body", "body": told[0].encode()})


async def started(node: str, port: int, host: str = "0.0.0.0") -> Any:
    options = HTTPOptions(host=host, port=port)
    loop = asyncio.get_running_loop()
    task, server = await start_on(
        node, start_asgi_http_server, app, options, event_loop=loop, enable_so_reuseport=False
    )
    while not server.started:
        await asyncio.sleep(0.01)
    return task, server


async def stopped(task: Any, server: Any) -> None:
    server.should_exit = True
    await task


async def test_the_server_listens_on_loopback_and_the_node_address_only() -> None:
    (port,) = free_ports(1)
    task, server = await started(NODE, port)
    try:
        async with httpx.AsyncClient() as client:
            for address in ("127.0.0.1", NODE):
                assert (await client.get(f"http://{address}:{port}/")).text == address
            with pytest.raises(httpx.ConnectError):
                await client.get(f"http://127.0.0.10:{port}/")
    finally:
        await stopped(task, server)
    for address in ("127.0.0.1", NODE):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=1)


async def test_on_a_node_that_is_known_by_loopback_there_is_one_socket() -> None:
    (port,) = free_ports(1)
    task, server = await started("127.0.0.1", port)
    try:
        assert [each.getsockname() for one in server.servers for each in one.sockets] == [("127.0.0.1", port)]
    finally:
        await stopped(task, server)


@pytest.mark.parametrize("node", ["127.0.0.1", NODE])
async def test_the_servers_peer_is_that_of_the_connection_whatever_headers_say(node: str) -> None:
    (port,) = free_ports(1)
    task, server = await started(node, port)
    try:
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{port}/peer", headers={"X-Forwarded-For": "203.0.113.9"})
        assert answer.text == "127.0.0.1"
    finally:
        await stopped(task, server)


@pytest.mark.parametrize("taken", ["127.0.0.1", NODE])
async def test_a_port_that_is_taken_on_either_address_is_refused_as_serve_expects(taken: str) -> None:
    with socket.create_server((taken, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(RuntimeError) as caught:
            await started(NODE, port)
        assert isinstance(caught.value.__cause__, OSError)
        # Nothing is left open on the other address.
        for address in {"127.0.0.1", NODE} - {taken}:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port), timeout=1)
