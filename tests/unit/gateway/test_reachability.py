"""A gateway that is cut off: from its directory, from a replica."""

from __future__ import annotations

import socket

from gateway_world import BODY, World, echo
from gateway_world import world as world

from tandem.gateway.replicas import engine_http, fleet


async def test_a_gateway_that_has_lost_its_directory_is_not_ready_and_still_answers(world: World) -> None:
    await world.add_engine(echo())
    assert (await world.http.get("/health/ready")).status_code == 200
    followed = world.app.state.fleet
    followed._task.cancel()
    followed._updated_at -= fleet.STALE_AFTER_S
    answer = await world.http.get("/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "unavailable"})
    assert (await world.http.get("/health/live")).status_code == 200
    # The known replicas stay: the answer to a directory that is away is not an outage.
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200


async def test_connections_to_engines_end_when_the_other_machine_acknowledges_nothing(world: World) -> None:
    await world.add_engine(echo())
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 200
    ((connection,),) = world.app.state.upstream._connections._open.values()
    sock = connection._transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * engine_http.UNREACHABLE_S
