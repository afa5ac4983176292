"""The API key of a request, from each of the headers that clients send it in."""

from __future__ import annotations

import base64

import pytest

from tandem.auth.credentials import LONGEST_HEADER, secret_of


def basic(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ([], None),
        ([(b"authorization", b"Bearer tdm-1")], "tdm-1"),
        ([(b"authorization", b"bearer   tdm-1 ")], "tdm-1"),
        ([(b"x-api-key", b"tdm-2")], "tdm-2"),
        ([(b"authorization", basic("anyone:tdm-3"))], "tdm-3"),
        ([(b"authorization", basic(":tdm:3"))], "tdm:3"),
        # Anthropic's SDK may send both.
        ([(b"x-api-key", b"tdm-2"), (b"authorization", b"Bearer tdm-1")], "tdm-1"),
        ([(b"authorization", basic("a:tdm-3")), (b"x-api-key", b"tdm-2")], "tdm-2"),
        # The first of two like headers counts, as proxies and servers do not agree on such requests.
        ([(b"authorization", b"Bearer tdm-1"), (b"authorization", b"Bearer tdm-9")], "tdm-1"),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Digest x")], None),
        ([(b"authorization", b"Basic !!!")], ""),
        ([(b"authorization", "Bearer \u00e9".encode())], ""),
        ([(b"authorization", b"Bearer " + b"x" * LONGEST_HEADER)], ""),
    ],
)
def test_the_secret_of_a_request(headers: list[tuple[bytes, bytes]], secret: str | None) -> None:
    assert secret_of(headers) == secret
