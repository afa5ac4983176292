"""Database schema. A change needs a migration in `migrations/versions` and a new `REVISION`."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from tandem.db.columns import ID_LENGTH, NAME_LENGTH, Base, UtcDateTime, ordered_text
from tandem.db.file_schema import FileRow, FileTenantRow, FileUseRow, UploadPartRow, UploadRow
from tandem.db.stored_schema import StoredAnswerRow, StoredTenantRow, WebhookDeliveryRow
from tandem.db.work_schema import BatchModelRow, CapacityRow, JobEventRow, JobRow, LeaderRow, QueueItemRow

__all__ = [
    "REVISION", "Base", "UtcDateTime", "ID_LENGTH", "NAME_LENGTH",
    "ApiKeyRow", "AuditRow", "BatchModelRow", "CapacityRow", "ClockRow", "FileRow", "FileTenantRow", "FileUseRow",
    "IdempotencyRow", "IdentityRow", "JobEventRow", "JobRow", "LeaderRow", "ModelRow", "NameRow", "PinRow", "PromotionRow",
    "QueueItemRow", "StoredAnswerRow", "StoredTenantRow", "TenantRow", "UploadPartRow", "UploadRow", "UsageRow",
    "UsageWriterRow", "WebhookDeliveryRow",
]  # fmt: skip

REVISION = "0014"
"""The newest migration: a database that is at it needs nothing done."""


class ClockRow(Base):
    """One row: the count of changes. Every writer bumps it first, so writers follow one another on any database."""

    __tablename__ = "registry_clock"

    id: Mapped[int] = mapped_column(primary_key=True)
    revision: Mapped[int]


class IdentityRow(Base):
    """One row: the registry's identity, drawn when it was made. Processes on other nodes compare it with the one they expect."""

    __tablename__ = "registry_identity"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)


class NameRow(Base):
    """A name that is or was in use. It outlives its versions, so that a removed id is never given out again."""

    __tablename__ = "registry_names"
    __table_args__ = (Index("ix_registry_names_kind", "kind", "name"),)

    name: Mapped[str] = mapped_column(ordered_text(NAME_LENGTH), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    last_version: Mapped[int]
    promoted: Mapped[str | None] = mapped_column(ordered_text(ID_LENGTH))
    """Id of the version that the bare name means: the newest of its promotions that was not taken back. It is kept here so that
    resolving and listing read one row a name."""
    tenant: Mapped[str | None] = mapped_column(String(63))
    """The tenant that it belongs to; None: it is shared by all."""


class ModelRow(Base):
    """One version of a model or adapter."""

    __tablename__ = "registry_models"
    __table_args__ = (
        UniqueConstraint("name", "version", name="uq_registry_models_name_version"),
        Index("ix_registry_models_base_name", "base", "name", "version"),
        Index("ix_registry_models_kind_revision", "kind", "revision"),
    )

    id: Mapped[str] = mapped_column(ordered_text(ID_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(
        ordered_text(NAME_LENGTH), ForeignKey("registry_names.name", name="fk_registry_models_name")
    )
    version: Mapped[int]
    kind: Mapped[str] = mapped_column(String(16))
    path: Mapped[str] = mapped_column(String(4096))
    """A folder, or of an adapter in a store its URI."""
    digest: Mapped[str] = mapped_column(String(64))
    base: Mapped[str | None] = mapped_column(
        ordered_text(ID_LENGTH),
        ForeignKey("registry_models.id", name="fk_registry_models_base", ondelete="RESTRICT"),
        index=True,
    )
    rank: Mapped[int | None]
    max_length: Mapped[int | None]
    lineage: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    name_row: Mapped[NameRow] = relationship(lazy="joined", innerjoin=True, viewonly=True)
    revision: Mapped[int] = mapped_column(unique=True)
    """The clock when it was registered: the order of registration, whatever the machines' clocks say."""


class PromotionRow(Base):
    """A version became what its name means. Rows stay when they are taken back: they are the name's history."""

    __tablename__ = "registry_promotions"
    __table_args__ = (Index("ix_registry_promotions_name", "name", "id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    """In the order of promotion."""
    name: Mapped[str] = mapped_column(
        ordered_text(NAME_LENGTH), ForeignKey("registry_names.name", name="fk_registry_promotions_name")
    )
    version: Mapped[int]
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    taken_back: Mapped[bool]
    """By a roll-back, or because the version was removed."""


class PinRow(Base):
    """An adapter that replicas of its base keep loaded."""

    __tablename__ = "registry_pins"

    target: Mapped[str] = mapped_column(ordered_text(ID_LENGTH), primary_key=True)
    """An id, or a bare name: then whichever version it means."""
    name: Mapped[str] = mapped_column(
        ordered_text(NAME_LENGTH), ForeignKey("registry_names.name", name="fk_registry_pins_name"), index=True
    )


class IdempotencyRow(Base):
    """A change that was made under an idempotency key, so that the same request sent again changes nothing."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index("ix_idempotency_keys_at", "at"),)

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    """SHA-256 of the caller, the change and the key that the caller gave."""
    result: Mapped[str] = mapped_column(ordered_text(ID_LENGTH))
    """Id of the version that the change resulted in."""
    at: Mapped[datetime] = mapped_column(UtcDateTime)


class ApiKeyRow(Base):
    """An API key. Rows stay when a key has ended: usage and the audit log name it."""

    __tablename__ = "api_keys"
    __table_args__ = (Index("ix_api_keys_revision", "revision"), Index("ix_api_keys_name", "name"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    """SHA-256 of the secret, in hexadecimal digits."""
    hint: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(96))
    tenant: Mapped[str] = mapped_column(String(63))
    role: Mapped[str] = mapped_column(String(16))
    models: Mapped[list[str]] = mapped_column(JSON)
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lifetime_s: Mapped[int | None]
    """For how long it was made; its successor is made for as long. Rotation brings `expires_at` forward."""
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revision: Mapped[int]
    """The registry's revision at its last change."""
    origin: Mapped[str] = mapped_column(String(32))
    """The first key of the chain of rotations that led to it; its own id where it is the first."""


class AuditRow(Base):
    """One entry of the audit log (`tandem.db.audit`)."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_at", "at"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    by: Mapped[str] = mapped_column(String(120))
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str] = mapped_column(String(120))
    address: Mapped[str | None] = mapped_column(String(64))
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class TenantRow(Base):
    """Limits of a tenant; tenants without a row have none."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)


class UsageRow(Base):
    """Requests and tokens of one hour, by key, model, adapter and route (`tandem.usage`)."""

    __tablename__ = "usage"
    __table_args__ = (Index("ix_usage_tenant_hour", "tenant", "hour"),)

    hour: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True)
    """The beginning of the hour in which the requests ended."""
    key_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Empty: requests without a key."""
    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    model: Mapped[str] = mapped_column(ordered_text(ID_LENGTH), primary_key=True)
    """Id of the base model."""
    adapter: Mapped[str] = mapped_column(ordered_text(ID_LENGTH), primary_key=True)
    """Id of the adapter; empty: the base model itself answered."""
    route: Mapped[str] = mapped_column(String(64), primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    estimated_requests: Mapped[int] = mapped_column(BigInteger)
    """Requests whose engine was killed: their tokens are those that had reached the gateway."""


class UsageWriterRow(Base):
    """The last batch that a process has written to `usage`: a batch that is written again changes nothing."""

    __tablename__ = "usage_writers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int]
    at: Mapped[datetime] = mapped_column(UtcDateTime)
