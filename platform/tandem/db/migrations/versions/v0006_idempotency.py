"""Idempotency keys of changes that must not be made twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    # The result is an id, which compares by code points everywhere (db.schema).
    result = sa.String(120).with_variant(sa.String(120, collation="C"), "postgresql")
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("result", result, nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_idempotency_keys_at", "idempotency_keys", ["at"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("idempotency_keys")
