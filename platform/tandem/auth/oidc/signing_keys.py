"""Public keys of a provider (JWKS, RFC 7517), each with the algorithms that its signatures may have. Pure.

The algorithms are those of the key's own type, never the token's choice alone: a token that names HS256 and is "signed" with the
bytes of a public key finds no key that takes it. Only algorithms whose check takes less than about 0.2 ms are accepted: those of
P-384 and P-521 take three times as long (docs/adr/0029).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

RSA_BITS = range(2048, 4097)
MAX_KEYS = 100
RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
ALGORITHMS = frozenset({*RSA, "ES256", "EdDSA"})
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One public key."""

    key: Any
    algorithms: tuple[str, ...]


def parse_keys(document: Any) -> dict[str, SigningKey]:
    """Usable keys of a JWKS document by their `kid`, "" for one without; ValueError for what is no such document.

    Keys for encryption, symmetric keys, and keys of other types and sizes are left out.
    """
    entries = document.get("keys") if isinstance(document, Mapping) else None
    if not isinstance(entries, list):
        raise ValueError("it has no list `keys`")
    usable_keys: dict[str, SigningKey] = {}
    for entry in entries[:MAX_KEYS]:
        if not isinstance(entry, Mapping) or entry.get("use", "sig") != "sig":
            continue
        kid = entry.get("kid", "")
        if not isinstance(kid, str) or kid in usable_keys:
            continue
        try:
            key = jwt.PyJWK({name: value for name, value in entry.items() if name != "alg"}).key
        except (jwt.PyJWTError, ValueError, TypeError, KeyError) as error:
            log.debug("The provider's key %.80r is not usable: %s", kid, error)
            continue
        allowed = _algorithms(key)
        declared = entry.get("alg")
        algorithms = allowed if declared is None else tuple(algorithm for algorithm in allowed if algorithm == declared)
        if algorithms:
            usable_keys[kid] = SigningKey(key, algorithms)
    return usable_keys


def _algorithms(key: Any) -> tuple[str, ...]:
    if isinstance(key, RSAPublicKey):
        return RSA if key.key_size in RSA_BITS else ()
    if isinstance(key, EllipticCurvePublicKey):
        return ("ES256",) if key.curve.name == "secp256r1" else ()
    return ("EdDSA",) if isinstance(key, Ed25519PublicKey) else ()
