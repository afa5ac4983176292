"""Models, adapters, their names and the clock."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the first tables."""
    clock = op.create_table(
        "registry_clock",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("revision", sa.Integer(), nullable=False),
    )
    op.bulk_insert(clock, [{"id": 1, "revision": 0}])
    op.create_table(
        "registry_names",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("last_version", sa.Integer(), nullable=False),
    )
    op.create_table(
        "registry_models",
        sa.Column("id", sa.String(120), primary_key=True),
        sa.Column(
            "name",
            sa.String(96),
            sa.ForeignKey("registry_names.name", name="fk_registry_models_name"),
            nullable=False,
        ),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("path", sa.String(4096), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column(
            "base",
            sa.String(120),
            sa.ForeignKey("registry_models.id", name="fk_registry_models_base", ondelete="RESTRICT"),
        ),
        sa.Column("rank", sa.Integer()),
        sa.Column("max_length", sa.Integer()),
        sa.Column("lineage", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False, unique=True),
        sa.UniqueConstraint("name", "version", name="uq_registry_models_name_version"),
    )
    op.create_index("ix_registry_models_base", "registry_models", ["base"])


def downgrade() -> None:
    """Drop them again, with all that they hold."""
    op.drop_index("ix_registry_models_base", "registry_models")
    for table in ("registry_models", "registry_names", "registry_clock"):
        op.drop_table(table)
