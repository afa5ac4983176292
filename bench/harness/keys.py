"""API keys for stacks under test."""

from __future__ import annotations


def make_key() -> str:
    """The secret of a new key of this process's home, with limits that are counted and never met."""
    from tandem.auth import KeyStore, Limits
    from tandem.registry import Registry
    from tandem.settings import settings

    registry = Registry(settings().registry_url)
    limits = Limits(requests_per_minute=10**7, tokens_per_minute=10**10, concurrent_requests=10**5)
    return KeyStore.at(registry.address).create("bench", by="bench", limits=limits).secret
