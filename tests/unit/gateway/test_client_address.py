"""Address of a client: the peer of its connection, or what this node's HAProxy says; nobody else is believed."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.gateway.identity.client_address import PROXY_SECRET, client_address


def scope(peer: str | None, secret: str | None, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"client": (peer, 1234) if peer else None, "headers": list(headers), PROXY_SECRET: secret}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"s3cret 203.0.113.9", "203.0.113.9"),
        (b"s3cret ::ffff:203.0.113.9", "203.0.113.9"),
        (b"s3cret 2001:DB8:0::1", "2001:db8::1"),
        (b"s3cret", "127.0.0.1"),
        (b"s3cret nothing", "127.0.0.1"),
        (b"other 203.0.113.9", "127.0.0.1"),
        (b" 203.0.113.9", "127.0.0.1"),
        (b"\xff 203.0.113.9", "127.0.0.1"),
    ],
)
def test_only_with_the_secret_of_haproxy_is_an_address_believed(value: bytes, expected: str) -> None:
    assert client_address(scope("127.0.0.1", "s3cret", (b"x-tandem-client", value))) == expected
    assert client_address(scope("127.0.0.1", None, (b"x-tandem-client", value))) == "127.0.0.1"


def test_headers_of_other_proxies_are_not_believed() -> None:
    forged = ((b"x-forwarded-for", b"203.0.113.9"), (b"forwarded", b"for=203.0.113.9"), (b"x-real-ip", b"203.0.113.9"))
    assert client_address(scope("10.0.0.7", "s3cret", *forged)) == "10.0.0.7"
    assert client_address(scope(None, "s3cret", *forged)) is None
