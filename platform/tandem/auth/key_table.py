"""A process's copy of all keys, by the hash of their secrets, kept current in the background.

A request is authenticated from memory alone: changes are read from the database once a second. While it does not answer,
known keys stay valid; a key that was revoked meanwhile is refused once it answers again.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NamedTuple

from tandem.auth.keys import LONGEST_SECRET, ChangedKey, Cursor, KeyStore, digest
from tandem.auth.principal import UNLIMITED, Limits, Principal
from tandem.registry.timed_calls import TimedCalls
from tandem.tasks import stop

POLL_S = 1.0
"""Seconds between two looks at the database: a change is seen by every gateway within twice that."""
PAGE_S = 3.0
"""Seconds that one page of keys may take."""
START_S = 10.0
"""Seconds that a new gateway waits for all keys before it takes requests, which it answers with 503 until it has them."""

log = logging.getLogger(__name__)


class Budgets(NamedTuple):
    """Keys, by id, and tenants that have a limit of tokens in a day."""

    keys: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()


class KeyTable:
    """Keys by digest. Not thread-safe: used by one event loop."""

    def __init__(self, store: KeyStore, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now
        self._keys: dict[str, ChangedKey] = {}
        self._budgeted: dict[str, str] = {}
        """Digests and ids of the keys with a limit of tokens in a day: changes of other things look at no key."""
        self._tenants: dict[str, Limits] = {}
        self._cursor = Cursor()
        self._revision = -1
        # Compared with where there is no key, so that an unknown secret takes as long as a known one.
        self._nobody = digest(secrets.token_urlsafe(32))
        self._calls = TimedCalls(store, "keys")
        self._polling: asyncio.Task[None] | None = None
        self.loaded = False
        """Whether all keys of the database have been read once."""
        self.has_keys = False
        """Whether any key was ever made, ended ones too: from then on an app answers nobody without a key."""
        self.budgets = Budgets()

    def authenticate(self, secret: str) -> Principal | None:
        """Whom a secret belongs to; None for one that is unknown, expired or revoked."""
        given = digest(secret[:LONGEST_SECRET])
        key = self._keys.get(given)
        same = hmac.compare_digest(given, self._nobody if key is None else key.digest)
        if key is None or not same or (key.expires_at is not None and key.expires_at <= self._now()):
            return None
        return key.principal

    def tenant_limits(self, tenant: str) -> Limits:
        """The limits of a tenant."""
        return self._tenants.get(tenant, UNLIMITED)

    async def start(self) -> None:
        """Begin to follow the database; returns when all keys were read, or after `START_S`, and then reads on."""
        self._polling = asyncio.create_task(self._poll())
        began = time.monotonic()
        while not self.loaded and time.monotonic() - began < START_S:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Stop polling, and close the connection to the database."""
        await stop(self._polling)
        self._calls.close()

    async def _poll(self) -> None:
        while True:
            try:
                await self._refresh()
            except Exception as error:  # noqa: BLE001 - the next look may succeed, and revocations depend on it
                log.warning(
                    "API keys could not be read: %s. Known keys stay valid.", str(error) or type(error).__name__
                )
            await asyncio.sleep(POLL_S)

    async def _refresh(self) -> None:
        """Read what has changed, page by page; all of it where the database is older than what was read (a backup)."""
        keys, budgeted, cursor, new = self._keys, self._budgeted, self._cursor, False
        revision = await self._calls.run(PAGE_S, self._store.revision)
        if revision < cursor.revision:
            log.warning(
                "The database of API keys is at revision %d, after %d: all keys are read again.",
                revision,
                cursor.revision,
            )
            keys, budgeted, cursor, new = {}, {}, Cursor(), True
        elif revision == self._revision:
            return
        while True:
            cursor, changed = await self._calls.run(PAGE_S, self._store.changes, cursor)
            if not changed:
                break
            new = True
            for key in changed:
                keys[key.digest] = key
                if key.principal is not None and key.principal.limits.tokens_per_day is not None:
                    budgeted[key.digest] = key.principal.key_id
                else:
                    budgeted.pop(key.digest, None)
        self._tenants = await self._calls.run(PAGE_S, self._store.tenants)
        self._keys, self._budgeted, self._cursor, self._revision = keys, budgeted, cursor, revision
        self.has_keys = self.has_keys or bool(keys)
        self.budgets = Budgets(
            frozenset(budgeted.values()) if new else self.budgets.keys,
            frozenset(name for name, each in self._tenants.items() if each.tokens_per_day is not None),
        )
        self.loaded = True
