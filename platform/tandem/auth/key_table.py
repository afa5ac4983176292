"""A process's copy of all keys, by the hash of their secrets, kept current in the background.

A request is authenticated from memory alone: the database is polled, by its revision, once a second. While it does not answer,
known keys stay valid; a key that was revoked meanwhile is refused once it answers again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from tandem.auth.keys import LONGEST_SECRET, ApiKey, KeyStore, digest
from tandem.auth.principal import Principal
from tandem.errors import TandemError

POLL_S = 1.0
"""Seconds between two looks at the database: a change is seen by every gateway within twice that."""
ANSWER_S = 4.0
"""Seconds that one look may take."""

log = logging.getLogger(__name__)


class KeyTable:
    """Keys by digest. Not thread-safe: used by one event loop."""

    def __init__(self, store: KeyStore, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now
        self._keys: dict[str, ApiKey] = {}
        self._revision = -1
        # Compared with where there is no key, so that an unknown secret takes as long as a known one.
        self._nobody = digest(secrets.token_urlsafe(32))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="keys")
        self._polling: asyncio.Task[None] | None = None

    @property
    def loaded(self) -> bool:
        """Whether the database has been read at all."""
        return self._revision >= 0

    @property
    def has_keys(self) -> bool:
        """Whether any key was ever made, ended ones too: from then on an app answers nobody without a key."""
        return bool(self._keys)

    def authenticate(self, secret: str) -> Principal | None:
        """Whom a secret belongs to; None for one that is unknown, expired or revoked."""
        given = digest(secret[:LONGEST_SECRET])
        key = self._keys.get(given)
        same = hmac.compare_digest(given, self._nobody if key is None else key.digest)
        return key.principal if key is not None and same and key.state(self._now()) == "active" else None

    async def start(self) -> None:
        """Read all keys, and begin to poll for changes. A database that does not answer yet is polled on."""
        await self._refresh()
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stop polling, and close the connection to the database."""
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling
        self._thread.shutdown(wait=False)
        self._store.close()

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._refresh()

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_S):
                revision, changed = await loop.run_in_executor(self._thread, self._store.changes, self._revision)
        except (TimeoutError, TandemError) as error:
            log.warning("API keys could not be read: %s. Known keys stay valid.", str(error) or "no answer in time")
            return
        self._keys.update({key.digest: key for key in changed})
        self._revision = revision
