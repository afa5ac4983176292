"""`If-Match` and `Idempotency-Key` of admin routes."""

from __future__ import annotations

from typing import Any

import pytest
from gateway_world import World
from gateway_world import world as world

ADMIN = {"Authorization": "Bearer secret"}


async def admin(world: World, path: str, **headers: str) -> tuple[int, dict[str, Any]]:
    answer = await world.http.post(f"/admin/adapters/{path}", headers={**ADMIN, **headers})
    return answer.status_code, answer.json()


def three_versions(world: World) -> None:
    for rank in (4, 8, 16):
        world.adapter("red", rank=rank)


async def test_a_change_can_be_bound_to_what_was_seen_before(world: World) -> None:
    three_versions(world)
    seen = (await world.http.get("/admin/adapters/red@1", headers=ADMIN)).headers["etag"]
    assert seen == '"red@3"'
    assert (await admin(world, "red/roll-back", **{"If-Match": seen}))[1]["id"] == "red@2"
    for path in ("red/roll-back", "red@1/promote"):
        status, answer = await admin(world, path, **{"If-Match": seen})
        error = answer["error"]
        assert (status, error["code"], error["param"]) == (412, "precondition_failed", "If-Match")
        assert "red means red@2 now" in error["message"]
    assert (await admin(world, "red@3/promote", **{"If-Match": "*"}))[0] == 200


async def test_a_request_that_a_proxy_sends_twice_is_carried_out_once(world: World) -> None:
    three_versions(world)
    for _ in range(2):
        status, answer = await admin(world, "red/roll-back", **{"Idempotency-Key": "once"})
        assert (status, answer["id"]) == (200, "red@2")
    # Another key, and the same one for another change, are other requests.
    assert (await admin(world, "red@3/promote", **{"Idempotency-Key": "once"}))[1]["id"] == "red@3"
    assert (await admin(world, "red/roll-back", **{"Idempotency-Key": "again"}))[1]["id"] == "red@2"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("If-Match", "red@1"),
        ("If-Match", '"red@1", "red@2"'),
        ("If-Match", '""'),
        ("Idempotency-Key", ""),
        ("Idempotency-Key", "x" * 256),
    ],
)
async def test_headers_that_cannot_be_are_refused_by_name(world: World, header: str, value: str) -> None:
    three_versions(world)
    status, answer = await admin(world, "red/roll-back", **{header: value})
    assert (status, answer["error"]["param"]) == (400, header)
    assert world.registry.resolve("red").id == "red@3"
