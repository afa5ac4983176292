"""Address of a request's client: its connection's peer, or the address in a header of this node's HAProxy.

HAProxy sends its clients' addresses in a header of Tandem's own, with a secret that only processes of its node's user can read
(`cluster.haproxy`). What other senders put there, or into X-Forwarded-For, counts for nothing.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress

from starlette.types import Scope

from tandem.cluster.haproxy import CLIENT_HEADER

HEADER = CLIENT_HEADER.encode()
PROXY_SECRET = "tandem.proxy_secret"
"""Key of an ASGI scope: the secret of this node's HAProxy."""


def client_address(scope: Scope) -> str | None:
    """The client's address; None if the server gives none."""
    peer = scope.get("client")
    secret: str | None = scope.get(PROXY_SECRET)
    if secret:
        for name, value in scope["headers"]:
            if name == HEADER:
                sent_secret, _, address = value.decode("latin-1").partition(" ")
                if hmac.compare_digest(sent_secret.encode("latin-1"), secret.encode()) and (
                    client := _address(address)
                ):
                    return client
    return _address(str(peer[0])) or str(peer[0])[:64] if peer else None


@functools.lru_cache(maxsize=4096)
def _address(text: str) -> str | None:
    """An address in its short form; None for any other text."""
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
