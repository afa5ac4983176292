"""Headers for browsers: CORS by configuration, no sniffing, no caching of errors, ids of requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from overload_world import ROUTE, Listening, World, overload_world

from tandem.auth import KeyStore
from tandem.config import GatewayConfig
from tandem.errors import ConfigError
from tandem.registry import Registry

PAGE = "https://chat.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


async def test_every_response_forbids_sniffing_and_errors_are_not_cached(tmp_path: Path) -> None:
    async with overload_world(tmp_path) as world:
        await world.add(Listening())
        answers = [
            await world.http.get("/health"),
            await world.http.get("/v1/models"),
            await world.ask("x"),
            await world.ask("x", stream=True),
            await world.http.get("/nothing"),
            await world.http.post(ROUTE, json={"model": "none", "prompt": "x"}),
            await world.http.post(ROUTE, content=b"x"),
            await world.http.get("/admin/adapters"),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 404, 415, 403]
        for answer in answers:
            assert answer.headers.get_list("x-content-type-options") == ["nosniff"], answer.url
            assert (answer.headers.get("cache-control") == "no-store") == (answer.status_code >= 400), answer.url


async def test_without_configuration_no_page_of_another_origin_may_read_an_answer(tmp_path: Path) -> None:
    async with overload_world(tmp_path) as world:
        await world.add(Listening())
        preflight = await world.http.options(ROUTE, headers=PREFLIGHT)
        answer = await world.ask("x", headers={"origin": PAGE})
        assert preflight.status_code == 405 and answer.status_code == 200
        for each in (preflight, answer):
            assert not [name for name in each.headers if name.startswith("access-control")]


async def test_pages_of_listed_origins_may_call_with_a_key_and_others_may_not(tmp_path: Path) -> None:
    async with overload_world(tmp_path, GatewayConfig(cors_origins=(PAGE,))) as world:
        await world.add(Listening())
        secret = await first_key(world, tmp_path)
        # A browser sends no key with its question.
        preflight = await world.http.options(ROUTE, headers=PREFLIGHT)
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGE
        assert "x-stainless-lang" in preflight.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in preflight.headers
        other = await world.http.options(ROUTE, headers={**PREFLIGHT, "origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        refused = await world.ask("x", headers={"origin": PAGE})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PAGE
        answer = await world.ask("x", headers={"origin": PAGE, "authorization": f"Bearer {secret}"}, stream=True)
        assert answer.status_code == 200 and "request-id" in answer.headers["access-control-expose-headers"]


async def first_key(world: World, folder: Path) -> str:
    """A key that the gateway knows."""
    secret = (
        KeyStore.at(Registry(f"sqlite:///{folder}/tandem.db").address).create("laptop", tenant="lab", by="ann").secret
    )
    while (await world.http.get("/v1/models")).status_code != 401:
        await asyncio.sleep(0.05)
    return secret


@pytest.mark.parametrize("origin", ["*", "chat.example.com", "https://*.example.com", "https://chat.example.com/"])
def test_origins_are_named_in_full(origin: str) -> None:
    with pytest.raises(ConfigError, match="gateway.cors_origins"):
        GatewayConfig(cors_origins=(origin,))


async def test_the_id_of_a_request_comes_back_unless_it_is_long_or_of_other_characters(tmp_path: Path) -> None:
    async with overload_world(tmp_path) as world:
        await world.add(Listening())
        for given, taken in (("mine-1", True), ("x" * 128, True), ("x" * 129, False), ("two words", False)):
            answer = await world.ask("x", headers={"x-request-id": given})
            assert answer.status_code == 200
            assert (answer.headers["request-id"] == answer.headers["x-request-id"] == given) == taken
            assert len(answer.headers["request-id"]) <= 128
