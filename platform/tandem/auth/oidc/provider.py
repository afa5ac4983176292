"""A provider's public keys, fetched in the background: no request waits for the provider.

They are fetched at start, every `REFRESH_S`, and when a token names an unknown key, at most every `LEAST_S`. While the provider
is away, known keys stay valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import aiohttp
from pydantic_core import from_json

from tandem.auth.oidc.signing_keys import SigningKey, parse_keys
from tandem.config.serving.oidc import OidcConfig, check_provider_url
from tandem.errors import ConfigError
from tandem.tasks import stop

REFRESH_S = 300.0
RETRY_S = 10.0
"""Seconds to the next attempt after one that failed."""
LEAST_S = 10.0
"""Shortest time between two fetches that unknown keys cause."""
FETCH_S = 5.0
"""Seconds that one answer of the provider may take."""
START_S = 5.0
"""Seconds that a new gateway waits for the keys before it takes requests."""
MAX_BYTES = 256 * 1024
log = logging.getLogger(__name__)


class Provider:
    """Keys by `kid`. Used by one event loop."""

    def __init__(self, config: OidcConfig) -> None:
        self.config = config
        self._keys: dict[str, SigningKey] = {}
        self._task: asyncio.Task[None] | None = None
        self._fetch_requested = asyncio.Event()
        self._fetching = False
        self._tried_at = float("-inf")
        self.loaded = False
        """Whether the keys have been fetched once."""

    def find(self, kid: str | None) -> SigningKey | None:
        """The key of a token; one without `kid` has the provider's only key, where there is one alone."""
        if kid is not None:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def request_fetch(self) -> bool:
        """Ask for a fetch, since a token names an unknown key; returns whether one is under way."""
        if not self._fetching and not self._fetch_requested.is_set() and time.monotonic() - self._tried_at >= LEAST_S:
            self._fetch_requested.set()
        return self._fetching or self._fetch_requested.is_set()

    async def start(self) -> None:
        """Begin to fetch; returns with the first keys, or after `START_S`, and then goes on in the background."""
        self._task = asyncio.create_task(self._run())
        started_at = time.monotonic()
        while not self.loaded and time.monotonic() - started_at < START_S:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Stop fetching."""
        await stop(self._task)

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=FETCH_S)
        while True:
            self._fetching, delay = True, REFRESH_S
            self._fetch_requested.clear()
            try:
                async with aiohttp.ClientSession(timeout=timeout) as session:
                    self._keys = await self._fetch(session)
                self.loaded = True
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError, ConfigError) as error:
                delay = RETRY_S
                log.warning(
                    "The keys of %s could not be fetched: %s. Known keys (%d) stay valid.",
                    self.config.issuer,
                    str(error) or type(error).__name__,
                    len(self._keys),
                )
            finally:
                self._fetching, self._tried_at = False, time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._fetch_requested.wait(), delay)

    async def _fetch(self, session: aiohttp.ClientSession) -> dict[str, SigningKey]:
        url = self.config.jwks_url
        if url is None:
            issuer = self.config.issuer
            document = await _get(session, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
            if not isinstance(document, dict) or document.get("issuer") != issuer:
                raise ValueError("the issuer's openid-configuration is of another issuer than gateway.oidc.issuer")
            url = str(document.get("jwks_uri", ""))
            check_provider_url("jwks_uri in the issuer's openid-configuration", url)
        keys = parse_keys(await _get(session, url))
        if not keys:
            raise ValueError("it has published no key that is usable here (RSA of 2048 to 4096 bits, P-256, Ed25519)")
        return keys


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    """The JSON at a URL; no redirect is followed, since it could leave https."""
    async with session.get(url, allow_redirects=False, headers={"Accept": "application/json"}) as answer:
        if answer.status != 200:
            raise ValueError(f"{url} answered {answer.status}")
        body = bytearray()
        async for chunk in answer.content.iter_any():
            body += chunk
            if len(body) > MAX_BYTES:
                raise ValueError(f"{url} answered more than {MAX_BYTES} bytes")
    return from_json(bytes(body))
