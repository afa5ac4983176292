"""Admin route of the audit log, and the entries that other admin routes write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request

from tandem.api.audit import AuditEntry, AuditPage
from tandem.auth.audit_log import audited
from tandem.gateway.identity.audit_writer import AuditWriter
from tandem.gateway.routes.management import actor, run_blocking, with_timezone

T = TypeVar("T")

PAGE = 1000


class AuditRoutes:
    """The route handler."""

    def __init__(self, audit: AuditWriter, retry_after_s: int = 5) -> None:
        self._audit = audit
        self._retry_after_s = retry_after_s

    def add_to(self, app: FastAPI) -> None:
        """Add the route to the app of management routes."""
        app.get("/audit")(self.entries)

    async def entries(
        self,
        after: Annotated[int | None, Query(ge=1, le=2**62)] = None,
        limit: Annotated[int, Query(ge=1, le=PAGE)] = 100,
        since: datetime | None = None,
        action: Annotated[str | None, Query(max_length=64)] = None,
        by: Annotated[str | None, Query(max_length=120)] = None,
    ) -> AuditPage:
        """Entries, newest first: `limit` of them that are older than the entry `after`.

        `since`: not older than a time (ISO 8601; without a zone: UTC). `action`: of an action such as `keys.create`, or of a
        group such as `keys`. `by`: of one key.
        """
        entries = await run_blocking(
            self._audit.log.page,
            after=after,
            limit=limit + 1,
            since=with_timezone(since, "since"),
            action=action,
            by=by,
            retry_after_s=self._retry_after_s,
        )
        page = entries[:limit]
        last_id = page[-1].id if len(entries) > limit else None
        data = [AuditEntry.model_validate(entry.to_json()) for entry in page]
        return AuditPage(data=data, has_more=last_id is not None, last_id=last_id)


class AuditedChanges:
    """Blocking changes of adapters, each with an audit entry: the state of the name before and after."""

    def __init__(self, audit: AuditWriter, state: Callable[[str], dict[str, Any]]) -> None:
        """`state` returns the registry's fields of a name now."""
        self._audit = audit
        self._state = state

    def __call__(
        self,
        request: Request,
        action: str,
        name: str,
        work: Callable[[], T],
        entry_fields: Callable[[T], dict[str, Any]],
    ) -> T:
        """Do `work` on `name` and write its entry; nothing is written if it raises. `entry_fields`: more fields of it."""
        return audited(
            work,
            state=functools.partial(self._state, name),
            record=self._audit.record,
            action=action,
            target=name,
            entry_fields=entry_fields,
            **actor(request),
        )
