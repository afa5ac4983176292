"""Stored answers in the database: storing within a quota, lookup, lists, chains of responses, deletion, expiry."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, Select, delete, func, literal, or_, select, tuple_, update
from sqlalchemy.orm import Session

from tandem.db.inserts import insert_into
from tandem.db.schema import StoredAnswerRow, StoredTenantRow
from tandem.registry.connection import RegistryConnection
from tandem.stored.content import unpack
from tandem.stored.records import AnswerKind, Chain, NewAnswer, StoredAnswer, StoredPage

EXPIRED_AT_ONCE = 1000
PAGE_BYTES = 16 * 2**20
"""Bytes of requests and answers in one page of a list, at most, unless the first answer alone has more."""


class StoredAnswers(RegistryConnection):
    """The stored answers in a registry's database. An answer of another tenant does not exist."""

    def add(self, new: NewAnswer, *, tenant_bytes: int) -> bool:
        """Store an answer; one of the same id or idempotency key is replaced.

        False, and nothing is stored, if its tenant would have more than `tenant_bytes`.
        """
        now = datetime.now(UTC)
        with self._adding() as session:
            # The tenant's row is locked first, so that answers of one tenant follow one another.
            session.execute(
                insert_into(session, StoredTenantRow).values(tenant=new.tenant, bytes=0).on_conflict_do_nothing()
            )
            taken = session.execute(
                update(StoredTenantRow)
                .where(StoredTenantRow.tenant == new.tenant, StoredTenantRow.bytes + len(new.content) <= tenant_bytes)
                .values(bytes=StoredTenantRow.bytes + len(new.content))
            )
            if not taken.rowcount:  # type: ignore[attr-defined]
                return False
            is_replaced = StoredAnswerRow.id == new.id
            if new.idempotency_key is not None:
                is_replaced |= StoredAnswerRow.idempotency_key == new.idempotency_key
            _delete(session, new.tenant, is_replaced)
            session.add(
                StoredAnswerRow(
                    tenant=new.tenant,
                    id=new.id,
                    kind=new.kind,
                    key_id=new.key_id,
                    model=new.model,
                    answered_model=new.answered_model,
                    labels=dict(new.metadata),
                    previous_id=new.previous_id,
                    created_at=now,
                    expires_at=now + timedelta(days=new.lifetime_days),
                    raw_bytes=new.raw_bytes,
                    content=new.content,
                    idempotency_key=new.idempotency_key,
                )
            )
        return True

    def get(self, tenant: str, kind: AnswerKind, answer_id: str) -> StoredAnswer | None:
        """One answer; None if the tenant has none of that id."""
        with self._reading() as session:
            row = session.scalars(_live(tenant, kind).where(StoredAnswerRow.id == answer_id)).one_or_none()
            return None if row is None else _record(row)

    def of_key(self, tenant: str, kind: AnswerKind, idempotency_key: str) -> StoredAnswer | None:
        """The answer of the request that was sent with an idempotency key; None if there is none."""
        with self._reading() as session:
            row = session.scalars(_live(tenant, kind).where(StoredAnswerRow.idempotency_key == idempotency_key))
            found = row.one_or_none()
            return None if found is None else _record(found)

    def page(
        self,
        tenant: str,
        kind: AnswerKind,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = False,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> StoredPage | None:
        """At most `limit` answers by time, fewer where they are large; None if there is no answer of the id `after`."""
        order = (StoredAnswerRow.created_at, StoredAnswerRow.id)
        query = _live(tenant, kind)
        if model is not None:
            query = query.where(or_(StoredAnswerRow.model == model, StoredAnswerRow.answered_model == model))
        for key, value in (metadata or {}).items():
            query = query.where(StoredAnswerRow.labels[key].as_string() == value)
        with self._reading() as session:
            if after is not None:
                cursor = session.scalars(_live(tenant, kind).where(StoredAnswerRow.id == after)).one_or_none()
                if cursor is None:
                    return None
                place, last = tuple_(*order), tuple_(cursor.created_at, cursor.id)
                query = query.where(place < last if newest_first else place > last)
            query = query.order_by(*(column.desc() if newest_first else column for column in order))
            sizes = query.with_only_columns(StoredAnswerRow.raw_bytes).limit(limit + 1)
            totals = list(itertools.accumulate(session.scalars(sizes)))
            count = max(1, min(limit, bisect.bisect_right(totals, PAGE_BYTES)))
            answers = tuple(_record(row) for row in session.scalars(query.limit(count)))
            return StoredPage(answers=answers, has_more=len(totals) > count)

    def chain(self, tenant: str, response_id: str, *, max_turns: int, max_bytes: int) -> Chain:
        """A response and those before it. The contents of more than `max_turns` responses, or `max_bytes`, are not read."""
        row, now = StoredAnswerRow, datetime.now(UTC)
        exists = (row.tenant == tenant, row.kind == AnswerKind.RESPONSE, row.expires_at > now)
        columns = (row.id, row.previous_id, row.raw_bytes)
        newest = select(*columns, literal(1).label("turn")).where(*exists, row.id == response_id)
        turns = newest.cte("turns", recursive=True)
        earlier = select(*columns, (turns.c.turn + 1).label("turn")).join(turns, row.id == turns.c.previous_id)
        turns = turns.union_all(earlier.where(*exists, turns.c.turn <= max_turns))
        with self._reading() as session:
            found = session.execute(select(turns).order_by(turns.c.turn.desc())).all()
            num_turns, raw_bytes = len(found), sum(each.raw_bytes for each in found)
            missing = found[0].previous_id if found else response_id
            answers: tuple[StoredAnswer, ...] = ()
            if num_turns > max_turns:
                missing = None
            elif missing is None and raw_bytes <= max_bytes:
                ids = [each.id for each in found]
                records = {
                    each.id: _record(each) for each in session.scalars(select(row).where(*exists, row.id.in_(ids)))
                }
                # One may have been deleted since.
                missing = next((each for each in ids if each not in records), None)
                answers = () if missing else tuple(records[each] for each in ids)
            return Chain(answers=answers, missing=missing, num_turns=num_turns, raw_bytes=raw_bytes)

    def set_metadata(
        self, tenant: str, kind: AnswerKind, answer_id: str, metadata: Mapping[str, str]
    ) -> StoredAnswer | None:
        """Replace the metadata of an answer, which is returned; None if there is none."""
        with self._adding() as session:
            session.execute(
                update(StoredAnswerRow)
                .where(StoredAnswerRow.tenant == tenant, StoredAnswerRow.id == answer_id, StoredAnswerRow.kind == kind)
                .values(labels=dict(metadata))
            )
        return self.get(tenant, kind, answer_id)

    def delete(self, tenant: str, kind: AnswerKind, answer_id: str) -> bool:
        """Delete an answer and its request; whether there was one."""
        with self._adding() as session:
            return _delete(session, tenant, StoredAnswerRow.id == answer_id, StoredAnswerRow.kind == kind) > 0

    def expire(self) -> int:
        """Delete answers that have expired, a thousand at most; how many there were."""
        is_due = StoredAnswerRow.expires_at <= datetime.now(UTC)
        with self._reading() as session:
            query = select(StoredAnswerRow.tenant, StoredAnswerRow.id).where(is_due).limit(EXPIRED_AT_ONCE)
            due = session.execute(query).all()
        num_deleted = 0
        for tenant in sorted({each.tenant for each in due}):
            ids = [each.id for each in due if each.tenant == tenant]
            with self._adding() as session:
                num_deleted += _delete(session, tenant, StoredAnswerRow.id.in_(ids), is_due)
        return num_deleted

    def used_bytes(self, tenant: str) -> int:
        """Compressed bytes of the tenant's answers."""
        with self._reading() as session:
            row = session.get(StoredTenantRow, tenant)
            return 0 if row is None else row.bytes


def _live(tenant: str, kind: AnswerKind) -> Select[StoredAnswerRow]:
    row = StoredAnswerRow
    return select(row).where(row.tenant == tenant, row.kind == kind, row.expires_at > datetime.now(UTC))


def _delete(session: Session, tenant: str, *which: ColumnElement[bool]) -> int:
    """Delete answers of a tenant and give back their bytes; how many there were.

    The tenant's row is locked before its answers, as in `add`.
    """
    of_tenant = update(StoredTenantRow).where(StoredTenantRow.tenant == tenant)
    session.execute(of_tenant.values(bytes=StoredTenantRow.bytes))
    deleted = session.execute(
        delete(StoredAnswerRow)
        .where(StoredAnswerRow.tenant == tenant, *which)
        .returning(func.length(StoredAnswerRow.content))
    ).all()
    session.execute(of_tenant.values(bytes=StoredTenantRow.bytes - sum(size for (size,) in deleted)))
    return len(deleted)


def _record(row: StoredAnswerRow) -> StoredAnswer:
    request, answer = unpack(row.content)
    return StoredAnswer(
        id=row.id,
        kind=AnswerKind(row.kind),
        metadata=row.labels,
        previous_id=row.previous_id,
        created_at=row.created_at,
        request=request,
        answer=answer,
    )
