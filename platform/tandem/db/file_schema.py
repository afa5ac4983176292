"""Tables of uploaded files and of uploads in parts (`tandem.files`)."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from tandem.db.columns import Base, UtcDateTime, ordered_text


class FileRow(Base):
    """A file that a client uploaded, or that a job wrote for one (`tandem.files`). Rows of deleted files stay for a while."""

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_tenant_created_at", "tenant", "created_at", "id"),
        Index("ix_files_status", "status"),
        Index("ix_files_expires_at", "expires_at"),
        Index("ix_files_deleted_at", "deleted_at"),
    )

    id: Mapped[str] = mapped_column(ordered_text(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(63))
    key_id: Mapped[str] = mapped_column(String(64))
    """The key that made it; empty: a job, or a client without a key."""
    purpose: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    location: Mapped[str | None] = mapped_column(String(4096))
    """Path or URI of the content; None: it is removed."""
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(String(1024))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    num_uses: Mapped[int]
    """Number of its rows in `file_uses`: a file with any is neither deleted nor does it expire."""
    check_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Until then one process checks the content; another may begin after that."""


class FileUseRow(Base):
    """A job that has not ended and reads a file."""

    __tablename__ = "file_uses"
    __table_args__ = (Index("ix_file_uses_job_id", "job_id"),)

    file_id: Mapped[str] = mapped_column(
        ordered_text(64), ForeignKey("files.id", name="fk_file_uses_file"), primary_key=True
    )
    job_id: Mapped[str] = mapped_column(String(120), primary_key=True)


class FileTenantRow(Base):
    """Bytes of a tenant's files and of the parts of its pending uploads together."""

    __tablename__ = "file_tenants"

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)


class UploadRow(Base):
    """A file that is uploaded in parts."""

    __tablename__ = "uploads"
    __table_args__ = (Index("ix_uploads_status_expires_at", "status", "expires_at"),)

    id: Mapped[str] = mapped_column(ordered_text(64), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(63))
    key_id: Mapped[str] = mapped_column(String(64))
    purpose: Mapped[str] = mapped_column(String(32))
    filename: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Size that the client has announced."""
    status: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    file_lifetime_s: Mapped[int | None]
    """Seconds until the file expires that it becomes; None: it does not."""
    part_ids: Mapped[list[str] | None] = mapped_column(JSON)
    """The parts in their order, once it is completed."""
    file_id: Mapped[str | None] = mapped_column(ordered_text(64))


class UploadPartRow(Base):
    """A part of an upload, until the upload is completed, cancelled or expired and the content is removed."""

    __tablename__ = "upload_parts"
    __table_args__ = (Index("ix_upload_parts_upload_id", "upload_id"),)

    id: Mapped[str] = mapped_column(ordered_text(64), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ordered_text(64), ForeignKey("uploads.id", name="fk_upload_parts_upload"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    location: Mapped[str] = mapped_column(String(4096))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
