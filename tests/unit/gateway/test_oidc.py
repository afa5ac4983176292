"""Tokens of an OIDC provider at the gateway: a real small provider on loopback, whose keys change, and which goes away."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from gateway_world import BODY, World, echo, running

from tandem.auth import KeyStore, Role
from tandem.auth.oidc import provider as provider_module
from tandem.auth.oidc.provider import MAX_BYTES
from tandem.config import OidcConfig

FIRST, SECOND = rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP256R1())


@dataclass
class SmallProvider:
    """Publishes its keys; `keys`: private keys by `kid`."""

    url: str = ""
    keys: dict[str, Any] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)
    status: int = 200
    issuer: str | None = None
    body: bytes | None = None
    runner: web.AppRunner | None = None
    port: int = 0

    async def start(self) -> None:
        app = web.Application()
        app.router.add_get("/realm/.well-known/openid-configuration", self._configuration)
        app.router.add_get("/realm/certs", self._certs)
        app.router.add_get("/elsewhere", self._certs)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self.runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/realm"

    async def stop(self) -> None:
        assert self.runner is not None
        await self.runner.cleanup()

    async def _configuration(self, request: web.Request) -> web.Response:
        self.asked["configuration"] += 1
        return web.json_response({"issuer": self.issuer or self.url, "jwks_uri": f"{self.url}/certs"})

    async def _certs(self, request: web.Request) -> web.Response:
        self.asked["certs"] += 1
        if self.status == 302 and request.path != "/elsewhere":
            raise web.HTTPFound("/elsewhere")
        if self.body is not None:
            return web.Response(body=self.body)
        keys = []
        for kid, key in self.keys.items():
            kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
            keys.append({**kind.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"})
        return web.json_response({"keys": keys}, status=200 if self.status == 302 else self.status)

    def token(self, kid: str = "first", key: Any = None, **changes: Any) -> str:
        key = key or self.keys[kid]
        algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        claims = {
            "iss": self.url,
            "aud": "tandem",
            "sub": "ann",
            "exp": int(time.time()) + 600,
            "org": "lab",
            **changes,
        }
        return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": kid})


@pytest.fixture
async def provider() -> AsyncIterator[SmallProvider]:
    made = SmallProvider(keys={"first": FIRST})
    await made.start()
    yield made
    await made.stop()


def config(provider: SmallProvider, **changes: Any) -> OidcConfig:
    roles = {"role_claim": "role", "roles": {"boss": "admin"}}
    return OidcConfig(issuer=provider.url, audience="tandem", tenant_claim="org", **roles, **changes)


@pytest.fixture
async def world(provider: SmallProvider, tmp_path: Path) -> AsyncIterator[World]:
    async with running(tmp_path, oidc=config(provider)) as result:
        await result.add_engine(echo())
        yield result


async def status(world: World, token: str, path: str = "/v1/completions") -> int:
    headers = {"Authorization": f"Bearer {token}"}
    if path == "/v1/completions":
        return (await world.http.post(path, json=BODY, headers=headers)).status_code
    return (await world.http.get(path, headers=headers)).status_code


async def until(world: World, token: str, expected: int) -> None:
    deadline = time.monotonic() + 10
    while (found := await status(world, token)) != expected:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


async def test_a_token_is_accepted_beside_keys_and_nothing_is_open(world: World, provider: SmallProvider) -> None:
    assert await status(world, provider.token()) == 200
    key = KeyStore.at(world.registry.address).create("ann", by="ann@host")
    await until(world, key.secret, 200)
    # No key was needed to close the app.
    assert (await world.http.post("/v1/completions", json=BODY)).status_code == 401
    assert provider.asked == {"configuration": 1, "certs": 1}


async def test_a_token_that_is_not_accepted_is_401_with_the_reason(world: World, provider: SmallProvider) -> None:
    for token, said in (
        (provider.token(aud="other"), "another audience"),
        (provider.token(iss="https://other.example"), "another issuer"),
        (provider.token(exp=int(time.time()) - 600), "expired"),
        (provider.token(org="No Tenant"), "tenant"),
        (provider.token(key=rsa.generate_private_key(65537, 2048)), "signature"),
        (jwt.encode({"sub": "ann"}, "x" * 32, algorithm="HS256", headers={"kid": "first"}), "signature must be one of"),
    ):
        answer = await world.http.get("/v1/models", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 401 and said in answer.json()["error"]["message"]
        assert answer.json()["error"]["code"] == "invalid_token"
        assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'
        assert token not in answer.text


async def test_roles_of_tokens_decide_about_admin_routes_and_the_audit_log_names_them(
    world: World, provider: SmallProvider
) -> None:
    assert await status(world, provider.token(role="boss"), "/admin/adapters") == 200
    assert await status(world, provider.token(), "/admin/adapters") == 403
    headers = {"Authorization": f"Bearer {provider.token(role='boss')}"}
    made = (await world.http.post("/admin/keys", json={"name": "bob"}, headers=headers)).json()
    await world.app.state.identity.audit.flush(final=True)
    entries = (await world.http.get("/admin/audit", headers=headers)).json()["data"]
    by = {entry["by"] for entry in entries}
    assert len(by) == 1 and by.pop().startswith("oidc:")
    assert {entry["action"] for entry in entries} == {"keys.create", "credentials.refused"}
    assert made["id"] in {entry["target"] for entry in entries} and headers["Authorization"][7:40] not in str(entries)


async def test_a_new_key_of_the_provider_is_fetched_when_a_token_names_it(
    world: World, provider: SmallProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "LEAST_S", 0.0)
    provider.keys = {"second": SECOND}
    answer = await world.http.get("/v1/models", headers={"Authorization": f"Bearer {provider.token('second')}"})
    assert answer.status_code == 503 and answer.headers["retry-after"] == "2"
    await until(world, provider.token("second"), 200)
    # The key that the provider has withdrawn counts no more.
    monkeypatch.setattr(provider_module, "LEAST_S", 60.0)
    assert await status(world, provider.token("first", key=FIRST)) == 401


async def test_unknown_keys_make_one_fetch_and_then_are_refused(world: World, provider: SmallProvider) -> None:
    world.app.state.identity.provider._tried_at -= 60
    before = provider.asked["certs"]
    seen = Counter([await status(world, provider.token(f"k{number}", key=SECOND)) for number in range(30)])
    assert provider.asked["certs"] == before + 1
    assert seen[401] > 0 and set(seen) <= {401, 503}
    assert await status(world, provider.token()) == 200


async def test_while_the_provider_is_away_known_keys_stay_valid(
    world: World, provider: SmallProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "LEAST_S", 0.0)
    keys = world.app.state.identity.provider
    await provider.stop()
    await until(world, provider.token("gone", key=SECOND), 503)
    tried = keys._tried_at
    while keys._tried_at == tried:
        await asyncio.sleep(0.02)
        await status(world, provider.token("gone", key=SECOND))
    assert await status(world, provider.token()) == 200
    # It is back, with another key.
    provider.keys = {"second": SECOND}
    await provider.start()
    await until(world, provider.token("second"), 200)


async def test_a_gateway_that_starts_without_its_provider_answers_503_to_tokens_and_follows_later(
    provider: SmallProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "START_S", 0.1)
    monkeypatch.setattr(provider_module, "RETRY_S", 0.1)
    token = provider.token()
    await provider.stop()
    async with running(tmp_path, oidc=config(provider)) as world:
        await world.add_engine(echo())
        assert await status(world, token) == 503
        key = KeyStore.at(world.registry.address).create("root", role=Role.ADMIN, by="ann@host")
        await until(world, key.secret, 200)
        await provider.start()
        await until(world, token, 200)


@pytest.mark.parametrize("fault", ["status", "issuer", "redirect", "size", "json", "empty", "list"])
async def test_an_answer_of_the_provider_that_cannot_be_is_not_taken(
    provider: SmallProvider,
    tmp_path: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(provider_module, "START_S", 0.3)
    match fault:
        case "status":
            provider.status = 500
        case "issuer":
            provider.issuer = "https://other.example"
        case "redirect":
            provider.status = 302
        case "size":
            provider.body = b'{"keys": [' + b" " * MAX_BYTES + b"]}"
        case "json":
            provider.body = b"<html>"
        case "empty":
            provider.body = b'{"keys": []}'
        case "list":
            provider.body = b"[" * 100_000
    async with running(tmp_path, oidc=config(provider)) as world:
        assert not world.app.state.identity.provider.loaded
        assert await status(world, provider.token()) == 503
    assert "could not be fetched" in caplog.text


async def test_the_address_of_the_keys_can_be_configured(provider: SmallProvider, tmp_path: Path) -> None:
    async with running(tmp_path, oidc=config(provider, jwks_url=f"{provider.url}/certs")) as world:
        await world.add_engine(echo())
        assert await status(world, provider.token()) == 200
    assert provider.asked == {"certs": 1}


async def test_without_a_provider_a_token_is_no_credential(provider: SmallProvider, tmp_path: Path) -> None:
    async with running(tmp_path) as world:
        KeyStore.at(world.registry.address).create("ann", by="ann@host")
        await until(world, provider.token(), 401)
