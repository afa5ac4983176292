"""Usage by hour, limits of tenants, and the tenant that a name belongs to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables and the column; names of before are shared."""
    names = sa.String(120).with_variant(sa.String(120, collation="C"), "postgresql")
    op.create_table(
        "usage",
        sa.Column("hour", sa.DateTime(), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("model", names, primary_key=True),
        sa.Column("adapter", names, primary_key=True),
        sa.Column("route", sa.String(64), primary_key=True),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("estimated_requests", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_usage_tenant_hour", "usage", ["tenant", "hour"])
    op.create_table(
        "usage_writers",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
    )
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("limits", sa.JSON(), nullable=False),
    )
    op.add_column("registry_names", sa.Column("tenant", sa.String(63)))


def downgrade() -> None:
    """Drop them."""
    with op.batch_alter_table("registry_names") as names:
        names.drop_column("tenant")
    op.drop_table("tenants")
    op.drop_table("usage_writers")
    op.drop_table("usage")
