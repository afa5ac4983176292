"""Files in the database: creation within a quota, lookup and lists by tenant, uses by jobs, deletion, expiry, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, delete, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tandem.db.schema import FileRow, FileTenantRow, FileUseRow
from tandem.errors import FileError, FileInUseError, UnknownFileError
from tandem.files.records import FileRecord, FileStatus, NewFile, Purpose, expiry_of
from tandem.files.tenants import give_back_bytes, quota_error, take_bytes
from tandem.registry.conditions import ALWAYS, Condition, remember, result_of_earlier
from tandem.registry.connection import RegistryConnection

T = TypeVar("T")

CHECKED = (Purpose.FINE_TUNE,)
"""Purposes whose content is checked after the upload; that of a batch is checked when the batch is made."""
LONGEST_DETAILS = 1024
MOST_EXPIRED = 1000
"""Files that are deleted at once when they have expired."""
KEPT_ROWS = timedelta(days=30)
"""Time for which the row of a deleted file stays, so that a list can go on after it."""


class FileStore(RegistryConnection):
    """The files in a registry's database. Does not change the registry's revision. A file of another tenant does not exist."""

    def add(self, new: NewFile, *, quota_bytes: int, once: Condition = ALWAYS) -> FileRecord:
        """Record a file whose content is stored.

        Under an idempotency key that has made a file before: that file. FileError if it has another content; FileQuotaError, and
        nothing is recorded, if the tenant would have more than `quota_bytes`.
        """

        def work(session: Session) -> FileRecord:
            if earlier := result_of_earlier(session, once):
                return _same(_find(session, earlier, new.tenant), new)
            record = insert_file(session, new, quota_bytes)
            remember(session, once, new.id)
            return record

        return self.once(work)

    def once(self, work: Callable[[Session], T]) -> T:
        """`work` in a transaction; again where another one has taken the same idempotency key meanwhile."""
        try:
            with self._adding() as session:
                return work(session)
        except Exception as error:
            if not isinstance(error.__cause__, IntegrityError):
                raise
        with self._adding() as session:
            return work(session)

    def get(self, file_id: str, tenant: str) -> FileRecord:
        """One file; UnknownFileError if the tenant has none of that id."""
        with self._reading() as session:
            return record_of(_find(session, file_id, tenant))

    def page(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
    ) -> list[FileRecord]:
        """At most `limit` files by time of creation; `after`: the id of the last one before them, which may be deleted."""
        with self._reading() as session:
            query = select(FileRow).where(FileRow.tenant == tenant, _is_live(datetime.now(UTC)))
            if purpose is not None:
                query = query.where(FileRow.purpose == purpose)
            order = (FileRow.created_at, FileRow.id)
            if after is not None:
                cursor = session.get(FileRow, after)
                if cursor is None or cursor.tenant != tenant:
                    raise UnknownFileError(
                        f"No such File object: {after}. `after` is an id of this list.", param="after"
                    )
                place, last = tuple_(*order), tuple_(cursor.created_at, cursor.id)
                query = query.where(place < last if newest_first else place > last)
            query = query.order_by(*(column.desc() if newest_first else column for column in order)).limit(limit)
            return [record_of(row) for row in session.scalars(query)]

    def delete(self, file_id: str, tenant: str) -> FileRecord:
        """Delete a file; its content is to be removed next. UnknownFileError; FileInUseError while a job reads it."""
        with self._adding() as session:
            if not _mark_deleted(session, [FileRow.id == file_id, FileRow.tenant == tenant]):
                row = _find(session, file_id, tenant)
                jobs = session.scalars(select(FileUseRow.job_id).where(FileUseRow.file_id == row.id).limit(3)).all()
                raise FileInUseError(
                    f"The file {file_id} is in use by {', '.join(jobs)}. Cancel the job or wait for its end, then try again.",
                    param="id",
                )
            return record_of(session.get_one(FileRow, file_id))

    def hold(self, file_id: str, tenant: str, job_id: str, *, session: Session | None = None) -> FileRecord:
        """Note that a job reads a file until `release`, in the transaction of `session` or in one of its own.

        UnknownFileError if there is none; again for the same job nothing happens.
        """
        if session is None:
            with self._adding() as own:
                return self.hold(file_id, tenant, job_id, session=own)
        # The update locks the row, so that the file is not deleted meanwhile.
        held = session.execute(
            update(FileRow)
            .where(FileRow.id == file_id, FileRow.tenant == tenant, _is_live(datetime.now(UTC)))
            .values(num_uses=FileRow.num_uses + 1)
        )
        if not held.rowcount:  # type: ignore[attr-defined]
            raise _unknown(file_id)
        if session.get(FileUseRow, (file_id, job_id)) is None:
            session.add(FileUseRow(file_id=file_id, job_id=job_id))
        else:
            session.execute(update(FileRow).where(FileRow.id == file_id).values(num_uses=FileRow.num_uses - 1))
        session.flush()
        return record_of(session.get_one(FileRow, file_id, populate_existing=True))

    def release(self, job_id: str, *, session: Session | None = None) -> None:
        """A job has ended: it reads no file any more. Again nothing happens."""
        if session is None:
            with self._adding() as own:
                return self.release(job_id, session=own)
        removed = session.scalars(
            delete(FileUseRow).where(FileUseRow.job_id == job_id).returning(FileUseRow.file_id)
        ).all()
        session.execute(update(FileRow).where(FileRow.id.in_(removed)).values(num_uses=FileRow.num_uses - 1))
        return None

    def readers(self) -> set[str]:
        """Ids of the jobs that read files."""
        with self._reading() as session:
            return set(session.scalars(select(FileUseRow.job_id).distinct()))

    def used_bytes(self, tenant: str) -> int:
        """Bytes of the tenant's files and parts."""
        with self._reading() as session:
            row = session.get(FileTenantRow, tenant)
            return 0 if row is None else row.bytes

    def check_quota(self, tenant: str, size_bytes: int, quota_bytes: int) -> int:
        """The bytes of the tenant's files and parts; FileQuotaError if it has no room for `size_bytes` more now."""
        used_bytes = self.used_bytes(tenant)
        if used_bytes + size_bytes > quota_bytes:
            raise quota_error(tenant, size_bytes, used_bytes, quota_bytes)
        return used_bytes

    def claim_unchecked(self, lease_s: float) -> FileRecord | None:
        """A file whose content has to be checked, for `lease_s` this caller's alone; None: there is none."""
        now = datetime.now(UTC)
        due = or_(FileRow.check_until.is_(None), FileRow.check_until < now)
        query = select(FileRow.id).where(FileRow.status == FileStatus.UPLOADED, FileRow.deleted_at.is_(None), due)
        with self._reading() as session:
            candidates = session.scalars(query.order_by(FileRow.created_at).limit(8)).all()
        for file_id in candidates:
            with self._adding() as session:
                claimed = session.execute(
                    update(FileRow)
                    .where(FileRow.id == file_id, FileRow.status == FileStatus.UPLOADED, due)
                    .values(check_until=now + timedelta(seconds=lease_s))
                )
                if claimed.rowcount:  # type: ignore[attr-defined]
                    return record_of(session.get_one(FileRow, file_id))
        return None

    def set_checked(self, file_id: str, status: FileStatus, details: str | None = None) -> None:
        """Record the result of a check."""
        with self._adding() as session:
            session.execute(
                update(FileRow)
                .where(FileRow.id == file_id)
                .values(status=status, status_details=details and details[:LONGEST_DETAILS], check_until=None)
            )

    def expire(self) -> int:
        """Delete files that have expired and that no job reads, `MOST_EXPIRED` at most; how many there were."""
        now = datetime.now(UTC)
        with self._reading() as session:
            # Without those that jobs read: a thousand of them would keep all others.
            is_due = (FileRow.deleted_at.is_(None), FileRow.expires_at <= now, FileRow.num_uses == 0)
            due = session.scalars(select(FileRow.id).where(*is_due).limit(MOST_EXPIRED)).all()
        if not due:
            return 0
        with self._adding() as session:
            return _mark_deleted(session, [FileRow.id.in_(due), FileRow.expires_at <= now])

    def deleted_contents(self) -> list[tuple[str, str]]:
        """Ids and locations of deleted files whose content is still there, a thousand at most."""
        with self._reading() as session:
            query = select(FileRow.id, FileRow.location).where(
                FileRow.deleted_at.is_not(None), FileRow.location.is_not(None)
            )
            return [(row.id, row.location) for row in session.execute(query.limit(1000))]

    def content_removed(self, file_id: str) -> None:
        """The content of a deleted file is removed."""
        with self._adding() as session:
            session.execute(
                update(FileRow).where(FileRow.id == file_id, FileRow.deleted_at.is_not(None)).values(location=None)
            )

    def forget_deleted(self) -> None:
        """Remove rows of files that were deleted long ago and have no content."""
        with self._adding() as session:
            session.execute(
                delete(FileRow).where(FileRow.deleted_at < datetime.now(UTC) - KEPT_ROWS, FileRow.location.is_(None))
            )

    def without_record(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids of which no file has a content."""
        wanted = set(ids)
        with self._reading() as session:
            query = select(FileRow.id).where(FileRow.id.in_(wanted), FileRow.location.is_not(None))
            return wanted - set(session.scalars(query))


def insert_file(session: Session, new: NewFile, quota_bytes: int) -> FileRecord:
    """Record a file in a transaction; FileQuotaError if it does not fit."""
    take_bytes(session, new.tenant, new.size_bytes, quota_bytes)
    created_at = datetime.now(UTC)
    row = FileRow(
        id=new.id,
        tenant=new.tenant,
        key_id=new.key_id,
        purpose=new.purpose.value,
        filename=new.filename,
        bytes=new.size_bytes,
        sha256=new.sha256,
        location=new.location,
        status=(FileStatus.UPLOADED if new.purpose in CHECKED else FileStatus.PROCESSED).value,
        status_details=None,
        created_at=created_at,
        expires_at=expiry_of(new.purpose, created_at, new.lifetime_s),
        deleted_at=None,
        num_uses=0,
        check_until=None,
    )
    session.add(row)
    session.flush()
    return record_of(row)


def record_of(row: FileRow) -> FileRecord:
    """The record of a row."""
    return FileRecord(
        id=row.id,
        tenant=row.tenant,
        key_id=row.key_id,
        purpose=Purpose(row.purpose),
        filename=row.filename,
        size_bytes=row.bytes,
        sha256=row.sha256,
        location=row.location or "",
        status=FileStatus(row.status),
        status_details=row.status_details,
        created_at=row.created_at,
        expires_at=row.expires_at,
    )


def _find(session: Session, file_id: str, tenant: str) -> FileRow:
    row = session.scalars(
        select(FileRow).where(FileRow.id == file_id, FileRow.tenant == tenant, _is_live(datetime.now(UTC)))
    ).one_or_none()
    if row is None:
        raise _unknown(file_id)
    return row


def _unknown(file_id: str) -> UnknownFileError:
    return UnknownFileError(
        f"No such File object: {file_id[:80]}. `GET /v1/files` lists those of your tenant.", param="id"
    )


def _is_live(now: datetime) -> ColumnElement[bool]:
    """The condition that a row's file exists for clients."""
    unexpired = or_(FileRow.expires_at.is_(None), FileRow.expires_at > now, FileRow.num_uses > 0)
    return FileRow.deleted_at.is_(None) & unexpired


def _mark_deleted(session: Session, which: list[ColumnElement[bool]]) -> int:
    """Delete files that no job reads, and give back their bytes; how many there were."""
    deleted: Any = session.execute(
        update(FileRow)
        .where(*which, FileRow.deleted_at.is_(None), FileRow.num_uses == 0)
        .values(deleted_at=datetime.now(UTC))
        .returning(FileRow.tenant, FileRow.bytes)
    ).all()
    for row in sorted(deleted):
        give_back_bytes(session, row.tenant, row.bytes)
    return len(deleted)


def _same(row: FileRow, new: NewFile) -> FileRecord:
    """The file that an earlier request with the same idempotency key made; FileError if this one has another content."""
    if (row.sha256, row.purpose) != (new.sha256, new.purpose.value):
        raise FileError(
            f"The same Idempotency-Key has made {row.id} from another content. Use a new key for another file.",
            param="Idempotency-Key",
        )
    return record_of(row)
