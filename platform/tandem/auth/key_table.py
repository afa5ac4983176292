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
"""Seconds between two reads of the database: every gateway has a change within twice that."""
PAGE_S = 3.0
"""Seconds that one page of keys may take."""
START_S = 10.0
"""Seconds that a new gateway waits for all keys before it takes requests, which it answers with 503 until it has them."""

log = logging.getLogger(__name__)


class Budgets(NamedTuple):
    """Keys, by the id that they are counted by, and tenants that have a limit of tokens in a day."""

    keys: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()


class KeyTable:
    """Keys by digest. Not thread-safe: used by one event loop."""

    def __init__(self, store: KeyStore, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._store = store
        self._now = now
        self._keys: dict[str, ChangedKey] = {}
        self._budgeted_ids: dict[str, str] = {}
        """Ids by digest of the keys with a limit of tokens in a day, so that `budgets` is made without a look at all keys."""
        self._digests: dict[str, str] = {}
        """Digests by the ids of active keys."""
        self._tenants: dict[str, Limits] = {}
        self._cursor = Cursor()
        self._revision = -1
        # Compared with the digest of an unknown secret, so that one takes as long as a known one.
        self._dummy_digest = digest(secrets.token_urlsafe(32))
        self._calls = TimedCalls(store, "keys")
        self._poll_task: asyncio.Task[None] | None = None
        self.loaded = False
        """Whether all keys of the database have been read once."""
        self.has_keys = False
        """Whether any key was ever made, ended ones too: from then on an app refuses requests without a key."""
        self.budgets = Budgets()

    def authenticate(self, secret: str) -> Principal | None:
        """The principal of a secret; None for one that is unknown, expired or revoked."""
        secret_digest = digest(secret[:LONGEST_SECRET])
        key = self._keys.get(secret_digest)
        is_equal = hmac.compare_digest(secret_digest, self._dummy_digest if key is None else key.digest)
        if key is None or not is_equal or (key.expires_at is not None and key.expires_at <= self._now()):
            return None
        return key.principal

    def principal_of(self, key_id: str) -> Principal | None:
        """The principal of a key by its id; None for one that is unknown, expired or revoked."""
        key = self._keys.get(self._digests.get(key_id, ""))
        if key is None or (key.expires_at is not None and key.expires_at <= self._now()):
            return None
        return key.principal

    def expired_at(self, secret: str) -> datetime | None:
        """When the key of a secret that is not accepted expired; None: it is unknown or was revoked."""
        key = self._keys.get(digest(secret[:LONGEST_SECRET]))
        return None if key is None or key.principal is None else key.expires_at

    def tenant_limits(self, tenant: str) -> Limits:
        """The limits of a tenant."""
        return self._tenants.get(tenant, UNLIMITED)

    async def start(self) -> None:
        """Begin to follow the database; returns when all keys were read, or after `START_S`, and then reads on."""
        self._poll_task = asyncio.create_task(self._poll())
        started_at = time.monotonic()
        while not self.loaded and time.monotonic() - started_at < START_S:
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Stop polling, and close the connection to the database."""
        await stop(self._poll_task)
        self._calls.close()

    async def _poll(self) -> None:
        while True:
            try:
                await self._refresh()
            except Exception as error:  # noqa: BLE001 - the next read may succeed, and revocations depend on it
                log.warning(
                    "API keys could not be read: %s. Known keys stay valid.", str(error) or type(error).__name__
                )
            await asyncio.sleep(POLL_S)

    async def _refresh(self) -> None:
        """Read changed keys, page by page; all keys if the database's revision went back (a restored backup)."""
        keys, budgeted_ids, cursor, has_changes = self._keys, self._budgeted_ids, self._cursor, False
        revision = await self._calls.run(PAGE_S, self._store.revision)
        if revision < cursor.revision:
            log.warning(
                "The database of API keys is at revision %d, after %d: all keys are read again.",
                revision,
                cursor.revision,
            )
            keys, budgeted_ids, cursor, has_changes = {}, {}, Cursor(), True
        elif revision == self._revision:
            return
        while True:
            cursor, changed_keys = await self._calls.run(PAGE_S, self._store.changes, cursor)
            if not changed_keys:
                break
            has_changes = True
            for key in changed_keys:
                keys[key.digest] = key
                if key.principal is not None:
                    self._digests[key.principal.key_id] = key.digest
                if key.principal is not None and key.principal.limits.tokens_per_day is not None:
                    budgeted_ids[key.digest] = key.principal.counted_as
                else:
                    budgeted_ids.pop(key.digest, None)
        self._tenants = await self._calls.run(PAGE_S, self._store.tenants)
        self._keys, self._budgeted_ids, self._cursor, self._revision = keys, budgeted_ids, cursor, revision
        self.has_keys = self.has_keys or bool(keys)
        self.budgets = Budgets(
            frozenset(budgeted_ids.values()) if has_changes else self.budgets.keys,
            frozenset(name for name, limits in self._tenants.items() if limits.tokens_per_day is not None),
        )
        self.loaded = True
