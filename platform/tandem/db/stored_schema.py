"""Tables of stored answers (`tandem.stored`), and of webhook deliveries (`tandem.jobs.webhooks`)."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import JSON, BigInteger, Index, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from tandem.db.columns import ID_LENGTH, Base, UtcDateTime, ordered_text


class StoredAnswerRow(Base):
    """A response or chat completion that a client asked to store, with its request."""

    __tablename__ = "stored_answers"
    __table_args__ = (
        Index("ix_stored_answers_created_at", "tenant", "kind", "created_at", "id"),
        Index("ix_stored_answers_expires_at", "expires_at"),
        Index("ix_stored_answers_idempotency_key", "tenant", "idempotency_key", unique=True),
    )

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    id: Mapped[str] = mapped_column(ordered_text(128), primary_key=True)
    """As the engine gave it, which may take it from the client's `x-request-id`: unique within a tenant only."""
    kind: Mapped[str] = mapped_column(String(16))
    key_id: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(255))
    """As the request named it."""
    answered_model: Mapped[str] = mapped_column(String(255))
    """As the answer names it."""
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSON)
    previous_id: Mapped[str | None] = mapped_column(ordered_text(128))
    """The response that this one goes on from."""
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    raw_bytes: Mapped[int] = mapped_column(BigInteger)
    """Size of the content before its compression."""
    content: Mapped[bytes] = mapped_column(LargeBinary)
    """Request and answer, as `stored.content` packs them."""
    idempotency_key: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the caller, the path and the request's `Idempotency-Key`."""


class StoredTenantRow(Base):
    """Bytes of a tenant's stored answers together, compressed."""

    __tablename__ = "stored_tenants"

    tenant: Mapped[str] = mapped_column(String(63), primary_key=True)
    bytes: Mapped[int] = mapped_column(BigInteger)


class WebhookDeliveryRow(Base):
    """One event for one webhook endpoint."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "state", "next_at"),
        Index("ix_webhook_deliveries_occurred_at", "occurred_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Made of endpoint, job, event and time, so that the same event is recorded once; the `webhook-id`."""
    endpoint: Mapped[str] = mapped_column(String(64))
    """SHA-256 of the endpoint's URL."""
    tenant: Mapped[str] = mapped_column(String(63))
    job: Mapped[str] = mapped_column(ordered_text(ID_LENGTH))
    event: Mapped[str] = mapped_column(String(64))
    occurred_at: Mapped[datetime] = mapped_column(UtcDateTime)
    state: Mapped[str] = mapped_column(String(16))
    attempts: Mapped[int]
    next_at: Mapped[datetime] = mapped_column(UtcDateTime)
    """The next attempt; while a gateway delivers it, the end of its lease."""
    error: Mapped[str | None] = mapped_column(String(512))
    """Why the last attempt failed."""
