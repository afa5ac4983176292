"""Credentials of an HTTP request: the API key in its headers, in any of the forms that clients send. Pure."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

LONGEST_HEADER = 16_384
"""Longest value of a header that is read, in bytes; a JWT with a list of groups fits."""

Headers = Iterable[tuple[bytes, bytes]]


def secret_of(headers: Headers) -> str | None:
    """The secret in `Authorization: Bearer`, `x-api-key`, or `Authorization: Basic` as its password; None: there is none.

    A request with several gets the first of these. What cannot be decoded is returned as an empty secret, which no key has.
    """
    values: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in (b"authorization", b"x-api-key"):
            values.setdefault(name, value)
    if any(len(value) > LONGEST_HEADER for value in values.values()):
        return ""
    scheme, _, credential = values.get(b"authorization", b"").strip().partition(b" ")
    credential = credential.strip()
    if scheme.lower() == b"bearer" and credential:
        return _text(credential)
    if b"x-api-key" in values:
        return _text(values[b"x-api-key"].strip())
    if scheme.lower() == b"basic" and credential:
        try:
            _, _, password = base64.b64decode(credential, validate=True).partition(b":")
        except binascii.Error:
            return ""
        return _text(password)
    return None


def _text(value: bytes) -> str:
    try:
        return value.decode("ascii")
    except UnicodeDecodeError:
        return ""
