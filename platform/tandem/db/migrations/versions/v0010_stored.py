"""Stored answers, and webhook deliveries."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "stored_answers",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("id", _id(128), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("model", sa.String(255), nullable=False),
        sa.Column("answered_model", sa.String(255), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("previous_id", _id(128)),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("raw_bytes", sa.BigInteger(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
    )
    op.create_index("ix_stored_answers_created_at", "stored_answers", ["tenant", "kind", "created_at", "id"])
    op.create_index("ix_stored_answers_expires_at", "stored_answers", ["expires_at"])
    op.create_table(
        "stored_tenants",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("job", _id(120), nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("occurred_at", sa.DateTime(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.DateTime(), nullable=False),
        sa.Column("error", sa.String(512)),
    )
    op.create_index("ix_webhook_deliveries_due", "webhook_deliveries", ["state", "next_at"])
    op.create_index("ix_webhook_deliveries_occurred_at", "webhook_deliveries", ["occurred_at"])
    op.create_index("ix_jobs_ended_at", "jobs", ["ended_at"])


def _id(length: int) -> sa.types.TypeEngine[str]:
    # Ids compare by code points everywhere (db.schema).
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def downgrade() -> None:
    """Drop the tables."""
    op.drop_index("ix_jobs_ended_at", "jobs")
    for table in ("webhook_deliveries", "stored_tenants", "stored_answers"):
        op.drop_table(table)
