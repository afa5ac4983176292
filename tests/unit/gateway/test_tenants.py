"""Names belong to a tenant or are shared: what belongs to another tenant does not exist."""

from __future__ import annotations

import asyncio
import time

import pytest
from gateway_world import Reflecting, World, echo, world
from small_folders import small_adapter

from tandem.auth import KeyStore, Role
from tandem.errors import RegistryError, UnknownModelError

__all__ = ["world"]


async def keys(world: World, **tenants: Role) -> dict[str, dict[str, str]]:
    """Headers with a key of each tenant, which the gateway knows."""
    store = KeyStore.at(world.registry.address)
    made = {
        tenant: {"authorization": f"Bearer {store.create(tenant, tenant=tenant, role=role, by='t').secret}"}
        for tenant, role in tenants.items()
    }
    deadline = time.monotonic() + 60
    while (
        any([(await world.http.get("/v1/models", headers=each)).status_code != 200 for each in made.values()])
        or (await world.http.get("/v1/models")).status_code != 401
    ):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    return made


def own(world: World, name: str, tenant: str | None) -> None:
    path = small_adapter(world.folder / name, name, rank=8)
    world.registry.register_adapter(name, path, base="base", tenant=tenant)


async def names(world: World, headers: dict[str, str]) -> list[str]:
    page = (await world.http.get("/v1/models", headers=headers)).json()
    return [each["id"] for each in page["data"]]


async def test_an_adapter_of_another_tenant_is_404_and_in_no_list(world: World):
    await world.add_engine(echo())
    own(world, "red", "lab")
    own(world, "blue", "shop")
    own(world, "grey", None)
    key = await keys(world, lab=Role.USER, shop=Role.USER, ops=Role.ADMIN)
    reached = {}
    for tenant, headers in key.items():
        reached[tenant] = []
        for name in ("red", "red@1", "blue", "grey", "base"):
            answer = await world.http.post("/v1/completions", json={"model": name, "prompt": "a"}, headers=headers)
            card = await world.http.get(f"/v1/models/{name}", headers=headers)
            assert answer.status_code == card.status_code
            if answer.status_code == 200:
                reached[tenant].append(name)
            else:
                unknown = await world.http.post(
                    "/v1/completions", json={"model": "nothing", "prompt": "a"}, headers=headers
                )
                told = answer.json()["error"]
                assert answer.status_code == 404 and told["code"] == unknown.json()["error"]["code"]
                # Nothing is told of what others have.
                rest = told["message"].replace(repr(name), "")
                assert ("red" in rest) == (tenant == "lab") and ("blue" in rest) == (tenant == "shop")
    everything = ["red", "red@1", "blue", "grey", "base"]
    assert reached == {"lab": ["red", "red@1", "grey", "base"], "shop": ["blue", "grey", "base"], "ops": everything}
    assert await names(world, key["lab"]) == ["base", "grey", "red"]
    assert await names(world, key["shop"]) == ["base", "blue", "grey"]
    # An unknown version of a name that belongs to others is told like any unknown name.
    missing = await world.http.post("/v1/completions", json={"model": "red@7", "prompt": "a"}, headers=key["shop"])
    assert missing.status_code == 404 and "it has" not in missing.json()["error"]["message"]


async def test_pages_are_whole_whatever_lies_between_that_others_own(world: World):
    await world.add_engine(echo())
    for number in range(6):
        own(world, f"a{number}", "lab" if number % 2 else "shop")
    key = await keys(world, lab=Role.USER)
    first = (await world.http.get("/v1/models", params={"limit": 2}, headers=key["lab"])).json()
    assert [each["id"] for each in first["data"]] == ["base", "a1", "a3"] and first["has_more"]
    rest = (await world.http.get("/v1/models", params={"after": first["last_id"]}, headers=key["lab"])).json()
    assert [each["id"] for each in rest["data"]] == ["a5"] and not rest["has_more"]


async def test_a_name_that_is_assigned_to_another_tenant_follows_at_the_next_request(world: World):
    await world.add_engine(echo())
    own(world, "red", None)
    key = await keys(world, lab=Role.USER, shop=Role.USER)
    body = {"model": "red", "prompt": "a"}
    assert (await world.http.post("/v1/completions", json=body, headers=key["shop"])).status_code == 200
    world.registry.assign("red", "lab", by="test")
    assert (await world.http.post("/v1/completions", json=body, headers=key["shop"])).status_code == 404
    assert (await world.http.post("/v1/completions", json=body, headers=key["lab"])).status_code == 200
    with pytest.raises(UnknownModelError):
        world.registry.assign("rde", "lab", by="test")


async def test_a_name_keeps_its_tenant_and_an_adapter_has_that_of_its_base(world: World):
    own(world, "red", "lab")
    other = small_adapter(world.folder / "other", "other", rank=8)
    with pytest.raises(RegistryError, match="red belongs to the tenant lab"):
        world.registry.register_adapter("red", other, base="base", tenant="shop")
    assert world.registry.register_adapter("red", other, base="base").tenant == "lab"
    world.registry.assign("base", "lab", by="test")
    assert world.registry.register_adapter("new", other, base="base").tenant == "lab"


async def test_prefix_caches_are_divided_by_tenant_and_by_a_clients_own_salt(world: World):
    await world.add_engine(Reflecting(("base@1", "base")))
    key = await keys(world, lab=Role.USER, shop=Role.USER)
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}

    async def salt(tenant: str, **more: str) -> str:
        answer = await world.http.post("/v1/messages", json={**body, **more}, headers=key[tenant])
        return str(answer.json()["request"]["cache_salt"])

    salts = [
        await salt("lab"),
        await salt("shop"),
        await salt("lab", cache_salt="mine"),
        await salt("shop", cache_salt="mine"),
    ]
    assert len(set(salts)) == 4 and await salt("lab") == salts[0]
    assert not any("lab" in each or "mine" in each for each in salts)
