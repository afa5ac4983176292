"""An identity for each registry, by which processes on other nodes know whether they have opened the right one."""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Draw the identity of this registry."""
    identity = op.create_table("registry_identity", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(identity, [{"id": uuid.uuid4().hex}])


def downgrade() -> None:
    """Forget it."""
    op.drop_table("registry_identity")
