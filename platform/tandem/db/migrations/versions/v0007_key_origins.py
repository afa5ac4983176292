"""The first key of a chain of rotations, by whose id the limits of all of them are counted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Until now rotations were not recorded: each key is its own origin."""
    op.add_column("api_keys", sa.Column("origin", sa.String(32)))
    op.execute("UPDATE api_keys SET origin = id")
    with op.batch_alter_table("api_keys") as keys:
        keys.alter_column("origin", existing_type=sa.String(32), nullable=False)


def downgrade() -> None:
    """Each key is counted by itself again."""
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_column("origin")
