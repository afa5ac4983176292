"""Name resolution that refuses addresses which are not public: what a URL from a config reaches is not inside the network."""

from __future__ import annotations

import errno
import ipaddress
import socket

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

TRANSLATED = (
    ipaddress.IPv6Network("64:ff9b::/96"),
    ipaddress.IPv6Network("64:ff9b:1::/48"),
    ipaddress.IPv6Network("2002::/16"),
)
"""IPv6 addresses that lead to an IPv4 address, which may be any."""


class PrivateAddressError(OSError):
    """A host whose address is not public."""


def is_public(text: str) -> bool:
    """Whether an IP address can be reached from anywhere; False also for what is no address."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif any(address in network for network in TRANSLATED):
            return False
    return address.is_global and not address.is_multicast


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses. The connection is made to the addresses that were checked."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses; PrivateAddressError if one of them is not public."""
        found = await self._resolver.resolve(host, port, family)
        for each in found:
            if not is_public(each["host"]):
                raise PrivateAddressError(errno.EACCES, "its host has an address that is not public (allow_private)")
        return found

    async def close(self) -> None:
        """Nothing is kept."""
        await self._resolver.close()
