"""Idempotency keys of stored answers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

TABLE, INDEX = "stored_answers", "ix_stored_answers_idempotency_key"


def upgrade() -> None:
    """Add the column, and let a key have one answer."""
    op.add_column(TABLE, sa.Column("idempotency_key", sa.String(64)))
    op.create_index(INDEX, TABLE, ["tenant", "idempotency_key"], unique=True)


def downgrade() -> None:
    """Drop both."""
    op.drop_index(INDEX, TABLE)
    op.drop_column(TABLE, "idempotency_key")
