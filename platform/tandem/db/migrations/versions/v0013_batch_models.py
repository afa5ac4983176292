"""Models that new batches name, which gateways look up before any request is queued."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

ID = sa.String(120).with_variant(sa.String(120, collation="C"), "postgresql")
NAME = sa.String(256).with_variant(sa.String(256, collation="C"), "postgresql")


def upgrade() -> None:
    """Make the table."""
    job = sa.ForeignKey("jobs.id", name="fk_batch_models_job", ondelete="CASCADE")
    op.create_table(
        "batch_models",
        sa.Column("job", ID, job, primary_key=True),
        sa.Column("model", NAME, primary_key=True),
        sa.Column("is_usable", sa.Boolean(), nullable=False),
        sa.Column("error", sa.JSON()),
        sa.Column("refused_at", sa.DateTime()),
    )


def downgrade() -> None:
    """Drop it."""
    op.drop_table("batch_models")
