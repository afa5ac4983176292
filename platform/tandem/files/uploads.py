"""Uploads in parts in the database: creation, parts, completion, cancellation, expiry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tandem.db.schema import UploadPartRow, UploadRow
from tandem.errors import FileError, UnknownFileError
from tandem.files.records import (
    FileRecord,
    NewFile,
    PartRecord,
    Purpose,
    UploadRecord,
    UploadStatus,
    new_upload_id,
)
from tandem.files.store import FileStore, insert_file
from tandem.files.tenants import give_back_bytes, take_bytes
from tandem.registry.conditions import ALWAYS, Condition, remember, result_of_earlier

LIFETIME = timedelta(hours=1)
"""Time that a client has to complete an upload, as at OpenAI."""
MOST_PARTS = 10_000
"""Parts of one upload."""


class UploadStore(FileStore):
    """The uploads in a registry's database, beside its files. An upload of another tenant does not exist."""

    def create_upload(
        self,
        *,
        tenant: str,
        key_id: str,
        purpose: Purpose,
        filename: str,
        size_bytes: int,
        file_lifetime_s: int | None = None,
        once: Condition = ALWAYS,
    ) -> UploadRecord:
        """Begin an upload of a file of `size_bytes`; the one that was begun before under the same idempotency key."""

        def work(session: Session) -> UploadRecord:
            if earlier := result_of_earlier(session, once):
                return upload_of(_find(session, earlier, tenant))
            now = datetime.now(UTC)
            row = UploadRow(
                id=new_upload_id(),
                tenant=tenant,
                key_id=key_id,
                purpose=purpose.value,
                filename=filename,
                bytes=size_bytes,
                status=UploadStatus.PENDING.value,
                created_at=now,
                expires_at=now + LIFETIME,
                file_lifetime_s=file_lifetime_s,
                part_ids=None,
                file_id=None,
            )
            session.add(row)
            remember(session, once, row.id)
            return upload_of(row)

        return self.once(work)

    def upload(self, upload_id: str, tenant: str) -> UploadRecord:
        """One upload; UnknownFileError if the tenant has none of that id."""
        with self._reading() as session:
            return upload_of(_find(session, upload_id, tenant))

    def pending_upload(self, upload_id: str, tenant: str, action: str) -> UploadRecord:
        """An upload that is pending; FileError for another one. `action`: what its client wants, for the error."""
        record = self.upload(upload_id, tenant)
        if record.status is not UploadStatus.PENDING:
            raise _ended_error(record, action)
        return record

    def add_part(self, part: PartRecord, tenant: str, *, quota_bytes: int, once: Condition = ALWAYS) -> PartRecord:
        """Record a part whose content is stored; the one of before under the same idempotency key.

        FileError if the upload is not pending, or has more bytes than announced; FileQuotaError.
        """

        def work(session: Session) -> PartRecord:
            if (earlier := result_of_earlier(session, once)) and (row := session.get(UploadPartRow, earlier)):
                return part_of(row)
            # The update locks the upload, so that parts are counted one after the other and none is added to one that ends.
            locked = session.execute(
                update(UploadRow)
                .where(UploadRow.id == part.upload_id, UploadRow.tenant == tenant)
                .values(status=UploadRow.status)
            )
            upload = upload_of(_find(session, part.upload_id, tenant))
            if not locked.rowcount or upload.status is not UploadStatus.PENDING:  # type: ignore[attr-defined]
                raise _ended_error(upload, "add a part")
            num_parts, sent_bytes = session.execute(
                select(func.count(), func.coalesce(func.sum(UploadPartRow.bytes), 0)).where(
                    UploadPartRow.upload_id == part.upload_id
                )
            ).one()
            check_capacity(upload, part.size_bytes, int(sent_bytes), num_parts)
            take_bytes(session, tenant, part.size_bytes, quota_bytes)
            session.add(
                UploadPartRow(
                    id=part.id,
                    upload_id=part.upload_id,
                    bytes=part.size_bytes,
                    location=part.location,
                    created_at=part.created_at,
                )
            )
            remember(session, once, part.id)
            return part

        return self.once(work)

    def parts(self, upload_id: str, part_ids: Sequence[str]) -> list[PartRecord]:
        """The parts in the order of their ids; FileError for an id that the upload does not have, or has twice."""
        with self._reading() as session:
            rows = session.scalars(select(UploadPartRow).where(UploadPartRow.upload_id == upload_id))
            known = {row.id: part_of(row) for row in rows}
        for place, part_id in enumerate(part_ids):
            if part_id not in known:
                raise FileError(f"`part_ids[{place}]` is no part of {upload_id}: {part_id[:80]}.", param="part_ids")
        if len(set(part_ids)) != len(part_ids):
            raise FileError("`part_ids` has a part twice.", param="part_ids")
        return [known[part_id] for part_id in part_ids]

    def complete(
        self, upload_id: str, part_ids: Sequence[str], file: NewFile, *, quota_bytes: int
    ) -> tuple[UploadRecord, FileRecord]:
        """Record the file that an upload becomes; its parts are to be removed next.

        FileError if the upload has ended meanwhile. The bytes of its parts make room for those of the file.
        """
        with self._adding() as session:
            self._end(session, upload_id, file.tenant, UploadStatus.COMPLETED, "complete it")
            record = insert_file(session, file, quota_bytes)
            row = session.get_one(UploadRow, upload_id, populate_existing=True)
            row.part_ids, row.file_id = list(part_ids), file.id
            session.flush()
            return upload_of(row), record

    def cancel(self, upload_id: str, tenant: str) -> UploadRecord:
        """Cancel an upload; its parts are to be removed next. FileError if it has ended; a cancelled one stays as it is."""
        with self._adding() as session:
            self._end(session, upload_id, tenant, UploadStatus.CANCELLED, "cancel it")
            return upload_of(session.get_one(UploadRow, upload_id, populate_existing=True))

    def expire_uploads(self) -> int:
        """End the pending uploads that have expired, a thousand at most; how many there were."""
        now = datetime.now(UTC)
        with self._reading() as session:
            query = select(UploadRow.id, UploadRow.tenant).where(
                UploadRow.status == UploadStatus.PENDING, UploadRow.expires_at <= now
            )
            due = [(row.id, row.tenant) for row in session.execute(query.limit(1000))]
        for upload_id, tenant in due:
            with self._adding() as session:
                self._end(session, upload_id, tenant, UploadStatus.EXPIRED, "")
        return len(due)

    def ended_parts(self) -> list[PartRecord]:
        """Parts of uploads that have ended, whose contents are to be removed; a thousand at most."""
        with self._reading() as session:
            query = select(UploadPartRow).join(UploadRow, UploadRow.id == UploadPartRow.upload_id)
            rows = session.scalars(query.where(UploadRow.status != UploadStatus.PENDING).limit(1000))
            return [part_of(row) for row in rows]

    def forget_part(self, part_id: str) -> None:
        """Remove a part whose content is removed."""
        with self._adding() as session:
            row = session.get(UploadPartRow, part_id)
            if row is not None:
                session.delete(row)

    def without_record(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids of which no file and no part has a content."""
        wanted = super().without_record(ids)
        with self._reading() as session:
            return wanted - set(session.scalars(select(UploadPartRow.id).where(UploadPartRow.id.in_(wanted))))

    def _end(self, session: Session, upload_id: str, tenant: str, status: UploadStatus, action: str) -> None:
        """Give a pending upload its final status, and give back the bytes of its parts; FileError if it has another one."""
        ended = session.execute(
            update(UploadRow)
            .where(UploadRow.id == upload_id, UploadRow.tenant == tenant, UploadRow.status == UploadStatus.PENDING)
            .values(status=status.value)
        )
        if ended.rowcount:  # type: ignore[attr-defined]
            total = select(func.coalesce(func.sum(UploadPartRow.bytes), 0)).where(UploadPartRow.upload_id == upload_id)
            give_back_bytes(session, tenant, int(session.execute(total).scalar_one()))
            return
        record = upload_of(_find(session, upload_id, tenant))
        if record.status is not status or status is UploadStatus.COMPLETED:
            raise _ended_error(record, action)


def check_capacity(upload: UploadRecord, size_bytes: int, sent_bytes: int, num_parts: int) -> None:
    """FileError if a part does not fit into an upload that has `sent_bytes` in `num_parts`."""
    if sent_bytes + size_bytes > upload.size_bytes:
        raise FileError(
            f"The upload {upload.id} was made for {upload.size_bytes:,} bytes, and its parts would have "
            f"{sent_bytes + size_bytes:,}. Make an upload of the right size.",
            param="data",
        )
    if num_parts >= MOST_PARTS:
        raise FileError(
            f"The upload {upload.id} has {num_parts:,} parts; more are not taken. Send larger parts.", param="data"
        )


def upload_of(row: UploadRow) -> UploadRecord:
    """The record of a row; a pending one that is due counts as expired."""
    status = UploadStatus(row.status)
    if status is UploadStatus.PENDING and row.expires_at <= datetime.now(UTC):
        status = UploadStatus.EXPIRED
    return UploadRecord(
        id=row.id,
        tenant=row.tenant,
        key_id=row.key_id,
        purpose=Purpose(row.purpose),
        filename=row.filename,
        size_bytes=row.bytes,
        status=status,
        created_at=row.created_at,
        expires_at=row.expires_at,
        file_lifetime_s=row.file_lifetime_s,
        part_ids=None if row.part_ids is None else tuple(row.part_ids),
        file_id=row.file_id,
    )


def part_of(row: UploadPartRow) -> PartRecord:
    """The record of a row."""
    return PartRecord(
        id=row.id, upload_id=row.upload_id, size_bytes=row.bytes, location=row.location, created_at=row.created_at
    )


def _find(session: Session, upload_id: str, tenant: str) -> UploadRow:
    row = session.get(UploadRow, upload_id, populate_existing=True)
    if row is None or row.tenant != tenant:
        raise UnknownFileError(
            f"No such Upload object: {upload_id[:80]}. `POST /v1/uploads` makes one.", param="upload_id"
        )
    return row


def _ended_error(upload: UploadRecord, action: str) -> FileError:
    return FileError(
        f"The upload {upload.id} is {upload.status.value}; to {action} it must be pending. Make another one.",
        param="upload_id",
    )
