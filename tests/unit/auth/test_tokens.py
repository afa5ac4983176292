"""Tokens of a provider: which are accepted, whom their claims name, and the attacks that must not work. Keys are made here."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from dataclasses import replace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tandem.auth import Role
from tandem.auth.oidc.signing_keys import SigningKey, parse_keys
from tandem.auth.oidc.tokens import KeysUnavailableError, TokenError, Tokens, claim, is_token
from tandem.config import OidcConfig, ServeConfig, from_dict
from tandem.errors import ConfigError

ISSUER = "https://login.example.com/realm"
CONFIG = OidcConfig(issuer=ISSUER, audience="tandem")
RSA = rsa.generate_private_key(65537, 2048)
OTHER_RSA = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
EDWARDS = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str, **values: Any) -> dict[str, Any]:
    """A private key's public part as a provider publishes it."""
    algorithms = jwt.algorithms
    if isinstance(key, rsa.RSAPrivateKey):
        made = algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        made = algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    else:
        made = algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return {**made, "kid": kid, **values}


class Keys:
    """Keys that are there already."""

    def __init__(self, *keys: dict[str, Any], fetching: bool = False) -> None:
        self._keys = parse_keys({"keys": list(keys)})
        self.loaded = True
        self.fetching = fetching

    def find(self, kid: str | None) -> SigningKey | None:
        return self._keys.get(kid or "")

    def request_fetch(self) -> bool:
        return self.fetching


def tokens(**changes: Any) -> Tokens:
    published = (jwk(RSA, "rsa"), jwk(EC, "ec"), jwk(EDWARDS, "ed"))
    return Tokens(replace(CONFIG, **changes), Keys(*published))


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    values = {"iss": ISSUER, "aud": "tandem", "sub": "ann", "iat": now, "exp": now + 600, **changes}
    return {name: value for name, value in values.items() if value is not None}


def signed(key: Any = RSA, algorithm: str = "RS256", kid: str | None = "rsa", **changes: Any) -> str:
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(claims(**changes), key, algorithm=algorithm, headers=headers)


def part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def refused(token: str, checks: Tokens | None = None) -> str:
    with pytest.raises(TokenError) as error:
        (checks or tokens()).authenticate(token)
    assert token not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [
        (RSA, "RS256", "rsa"),
        (RSA, "RS512", "rsa"),
        (RSA, "PS256", "rsa"),
        (EC, "ES256", "ec"),
        (EDWARDS, "EdDSA", "ed"),
    ],
)
def test_tokens_by_each_kind_of_key_name_their_subject(key: Any, algorithm: str, kid: str) -> None:
    principal = tokens().authenticate(signed(key, algorithm, kid))
    assert principal.key_id == f"oidc:{hashlib.sha256(f'{ISSUER} ann'.encode()).hexdigest()[:16]}"
    assert (principal.tenant, principal.role, principal.models) == ("default", Role.USER, ())
    assert "ann" not in principal.key_id


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"aud": "other"}, "another audience"),
        ({"aud": ["other", "more"]}, "another audience"),
        ({"aud": None}, "no `aud`"),
        ({"iss": "https://login.example.com/other"}, "another issuer"),
        ({"iss": f"{ISSUER}/"}, "another issuer"),
        ({"iss": None}, "no `iss`"),
        ({"exp": int(time.time()) - 60}, "expired"),
        ({"exp": None}, "no `exp`"),
        ({"exp": "soon"}, "not valid"),
        ({"nbf": int(time.time()) + 1_000_000}, "not valid yet"),
        ({"sub": None}, "no `sub`"),
        ({"sub": ""}, "`sub`"),
        ({"sub": "s" * 300}, "`sub`"),
    ],
)
def test_a_token_with_a_wrong_claim_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    payload = json.dumps(claims(**changes)).encode()
    token = jwt.api_jws.encode(payload, RSA, algorithm="RS256", headers={"kid": "rsa"})
    assert reason in refused(token)


def test_clocks_may_differ_by_the_leeway_and_no_more() -> None:
    late = signed(exp=int(time.time()) - 20)
    assert tokens(leeway_s=30).authenticate(late)
    assert "expired" in refused(late, tokens(leeway_s=0))


def test_an_audience_among_several_is_enough() -> None:
    assert tokens().authenticate(signed(aud=["account", "tandem"]))


def test_a_token_without_a_signature_is_refused() -> None:
    body = part(claims())
    for algorithm in ("none", "None", "NONE", "nOnE"):
        for signature in ("", "c2lnbmF0dXJl"):
            assert "signature" in refused(f"{part({'alg': algorithm, 'kid': 'rsa'})}.{body}.{signature}")
    valid = signed()
    refused(valid.rpartition(".")[0] + ".")


@pytest.mark.parametrize("kid", ["rsa", "ec", "ed"])
@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_public_key_is_no_shared_secret(kid: str, algorithm: str) -> None:
    key = {"rsa": RSA, "ec": EC, "ed": EDWARDS}[kid]
    published = jwk(key, kid)
    secrets = [json.dumps(published).encode()]
    for encoding, form in (
        (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
    ):
        secrets.append(key.public_key().public_bytes(encoding, form))
    for secret in secrets:
        head = f"{part({'alg': algorithm, 'kid': kid})}.{part(claims())}"
        digest = hmac.new(secret, head.encode(), f"sha{algorithm[2:]}").digest()
        token = f"{head}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"
        assert "signature must be one of" in refused(token)


def test_a_key_takes_the_algorithms_of_its_own_type_and_of_its_declaration_only() -> None:
    for header in ({"alg": "ES256", "kid": "rsa"}, {"alg": "RS256", "kid": "ec"}, {"alg": "EdDSA", "kid": "rsa"}):
        _, body, signature = signed().split(".")
        refused(f"{part(header)}.{body}.{signature}")
    narrow = Tokens(CONFIG, Keys(jwk(RSA, "rsa", alg="RS256")))
    assert narrow.authenticate(signed())
    refused(signed(RSA, "RS512"), narrow)


def test_another_key_and_a_changed_payload_are_refused() -> None:
    assert "not valid" in refused(signed(OTHER_RSA))
    head, _, signature = signed().split(".")
    refused(f"{head}.{part(claims(sub='root'))}.{signature}")


def test_keys_that_a_token_brings_along_are_not_used() -> None:
    headers = {
        "kid": "mine",
        "jwk": jwk(OTHER_RSA, "mine"),
        "jku": "https://evil.example/keys",
        "x5u": "https://evil.example",
    }
    token = jwt.encode(claims(), OTHER_RSA, algorithm="RS256", headers=headers)
    assert "no such key" in refused(token)
    headers["kid"] = "rsa"
    refused(jwt.encode(claims(), OTHER_RSA, algorithm="RS256", headers=headers))


@pytest.mark.parametrize(
    "token",
    [
        "..", "a.b.c", "eyJ.eyJ.x", f"{part([])}.{part({})}.x", f"{part({'alg': 'RS256', 'kid': 5})}.{part({})}.x",
        f"{part({'alg': ['RS256']})}.{part({})}.x",
        f"{base64.urlsafe_b64encode(b'[' * 1500).decode()}.{part({})}.x", "x" * 3000 + ".b.c", f"{'é' * 5}.b.c",
        f"{part({'alg': 'RS256', 'kid': 'rsa', 'crit': ['x'], 'x': 1})}.{part({})}.x",
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(token: str) -> None:
    refused(token)


def test_a_long_header_is_refused_before_it_is_read() -> None:
    token = jwt.encode(claims(), RSA, algorithm="RS256", headers={"kid": "rsa", "more": "x" * 3000})
    assert "too long" in refused(token)


def test_while_keys_are_being_fetched_an_unknown_key_is_no_refusal() -> None:
    with pytest.raises(KeysUnavailableError):
        Tokens(CONFIG, Keys(jwk(EC, "ec"), fetching=True)).authenticate(signed())
    assert "no such key" in refused(signed(kid="gone"))


def test_the_tenant_is_that_of_the_claim_and_tokens_without_it_are_refused() -> None:
    checks = tokens(tenant_claim="https://example.com/org")
    assert checks.authenticate(signed(**{"https://example.com/org": "lab-1"})).tenant == "lab-1"
    for value in (None, "", "Lab 1", 5, ["lab"], "l" * 64):
        assert "tenant" in refused(signed(**{"https://example.com/org": value}), checks)
    assert tokens(tenant_claim="org.id").authenticate(signed(org={"id": "lab"})).tenant == "lab"


def test_the_role_is_the_most_powerful_that_the_claim_names() -> None:
    checks = tokens(role_claim="realm.groups", roles={"llm-admins": "admin", "llm-train": "trainer"})
    for value, role in (
        (["everyone", "llm-train", "llm-admins"], Role.ADMIN),
        (["llm-train"], Role.TRAINER),
        ("llm-admins", Role.ADMIN),
        (["admin"], Role.USER),
        ({"llm-admins": True}, Role.USER),
        (None, Role.USER),
    ):
        assert checks.authenticate(signed(realm={"groups": value})).role is role
    assert tokens(role_claim="role").authenticate(signed(role="trainer")).role is Role.TRAINER
    assert tokens().authenticate(signed(role="admin")).role is Role.USER
    assert "no role" in refused(signed(role="root"), tokens(role_claim="role", default_role=None))


def test_models_are_those_of_the_claim_and_none_of_them_is_not_all() -> None:
    checks = tokens(models_claim="models")
    assert checks.authenticate(signed(models=["a", "b@1"])).models == ("a", "b@1")
    assert checks.authenticate(signed(models="a b@1")).models == ("a", "b@1")
    for value in (None, [], "", {}, [5], ["m" * 300], ["m"] * 2000):
        assert "models" in refused(signed(models=value), checks)


def test_keys_of_other_kinds_sizes_and_uses_are_left_out() -> None:
    small, large = rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP384R1())
    document = {
        "keys": [
            jwk(RSA, "good"), jwk(small, "small"), jwk(large, "slow"), jwk(OTHER_RSA, "good"), jwk(EC, "enc", use="enc"),
            {"kty": "oct", "k": "c2VjcmV0", "kid": "shared", "alg": "HS256"}, {"kty": "RSA", "kid": "broken", "n": "?"},
            {"kty": "RSA", "kid": "none"}, "text", jwk(EC, "oaep", alg="ECDH-ES"), jwk(EC, "five") | {"kid": 5},
        ]
    }  # fmt: skip
    found = parse_keys(document)
    assert set(found) == {"good"} and found["good"].key == RSA.public_key()
    for wrong in (None, [], {}, {"keys": {}}, {"keys": "x"}):
        with pytest.raises(ValueError, match="keys"):
            parse_keys(wrong)


def test_a_claim_with_dots_in_its_name_goes_before_one_inside_another() -> None:
    assert claim({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert claim({"a": {"b": {"c": 2}}}, "a.b.c") == 2 and claim({"a": 1}, "a.b") is None and claim({}, "a") is None


def test_api_keys_are_no_tokens() -> None:
    assert is_token(signed()) and not is_token("tdm-a.b.c") and not is_token("secret") and not is_token("a.b.c.d")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"issuer": "http://login.example.com"}, "must be an https URL"),
        ({"issuer": "login.example.com"}, "must be an https URL"),
        ({"issuer": "https://h:port"}, "no URL"),
        ({"jwks_url": "file:///etc/passwd"}, "must be an https URL"),
        ({"audience": ""}, "audience is empty"),
        ({"role_claim": ""}, "role_claim is empty"),
        ({"role_claim": "r", "roles": {"x": "root"}}, "roles.x is 'root'"),
        ({"roles": {"x": "admin"}}, "role_claim is not"),
        ({"default_role": None}, "no token would be accepted"),
        ({"default_role": "root"}, "default_role is 'root'"),
        ({"leeway_s": 3600}, "between 0 and 300"),
        ({"secret": "x"}, "is not a setting"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    values = {"issuer": ISSUER, "audience": "tandem", **changes}
    with pytest.raises(ConfigError, match=said):
        from_dict(ServeConfig, {"gateway": {"oidc": values}})


def test_a_config_on_this_machine_may_be_http() -> None:
    assert OidcConfig(issuer="http://127.0.0.1:8080", audience="tandem")
