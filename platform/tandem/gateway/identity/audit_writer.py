"""Audit log of a gateway: changes by admins at once, refused credentials in batches; no request waits for a batch.

Refused credentials are counted in memory and written every `FLUSH_S`, by a thread of their own. While the database does not
answer, changes wait in memory, at most `MAX_UNWRITTEN` of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from starlette.types import Scope

from tandem.auth.audit_log import AuditLog
from tandem.auth.keys import PREFIX
from tandem.auth.refusals import Refusal, Refusals
from tandem.db.audit import Change
from tandem.errors import TandemError
from tandem.gateway.errors import ApiError, masked_path, path_below
from tandem.gateway.identity.client_address import client_address
from tandem.tasks import stop

FLUSH_S = 5.0
STOP_S = 5.0
"""Seconds that the last write may take when a gateway stops."""
MAX_UNWRITTEN = 2000
"""Entries kept in memory while the database does not answer."""
HINT_LENGTH = 8
"""Characters of a refused key that are kept."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
log = logging.getLogger(__name__)


class AuditWriter:
    """Used by one event loop; `record` by any thread."""

    def __init__(self, audit: AuditLog) -> None:
        self.log = audit
        self.route_segments: frozenset[str] = frozenset()
        """The fixed parts of the app's routes; other parts of a path are not kept, since they may be a secret."""
        self._refusals = Refusals()
        self._unwritten: deque[Change] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")
        self._task: asyncio.Task[None] | None = None
        self._failing = False

    def start(self) -> None:
        """Begin to write batches."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write the remaining entries, within `STOP_S`."""
        await stop(self._task)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self.flush(final=True)
        self._thread.shutdown(wait=False)
        self.log.close()

    def refuse(self, scope: Scope, error: ApiError, *, by: str, secret: str | None) -> None:
        """Count a request that was answered 401 or 403."""
        refusal = Refusal(
            status=error.status,
            code=error.code or "",
            address=client_address(scope),
            by=by,
            target=self._target(scope),
        )
        hint = secret[:HINT_LENGTH] if secret and secret.startswith(PREFIX) else None
        self._refusals.add(refusal, datetime.now(UTC), hint)

    def record(self, change: Change) -> None:
        """Write a change that has been made; blocking. Where the database refuses, it is written later."""
        try:
            self.log.append([change])
        except TandemError as error:
            log.warning(
                "%s of %s by %s is not in the audit log yet: %s", change.action, change.target, change.by, error
            )
            if len(self._unwritten) < MAX_UNWRITTEN:
                self._unwritten.append(change)

    async def flush(self, *, final: bool = False) -> None:
        """Write a batch now; entries that cannot be written stay for the next one, or are only counted."""
        now = datetime.now(UTC)
        refusals = self._refusals.take(now, final=final)
        changes = [self._unwritten.popleft() for _ in range(len(self._unwritten))]
        if not refusals and not changes:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.log.append, [*changes, *refusals])
        except TandemError as error:
            if not self._failing:
                log.warning("The audit log could not be written: %s", error)
            self._failing = True
            capacity = MAX_UNWRITTEN - len(self._unwritten)
            entries = [*changes, *refusals][:capacity]
            self._unwritten.extendleft(reversed(entries))
            if dropped := _count_events([*changes, *refusals][capacity:]):
                self._refusals.put_back(dropped, now)
        else:
            self._failing = False

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await self.flush()
            except Exception:
                log.exception("A batch of the audit log was lost.")

    def _target(self, scope: Scope) -> str:
        """Method and path, with `*` for parts that are in no route."""
        method = scope["method"] if scope["method"] in METHODS else "*"
        return f"{method} {masked_path(path_below(scope), self.route_segments)}"


def _count_events(changes: Iterable[Change]) -> int:
    """The number of events that entries count together."""
    return sum(int((change.after or {}).get("count", 1)) for change in changes)
