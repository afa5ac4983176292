"""An identity for each registry, by which processes on other nodes know whether they have opened the right one.

On PostgreSQL names are ordered by code points from here on, whatever the database's language.
"""

from __future__ import annotations

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

NAMES = {
    "registry_names": {"name": 96, "promoted": 120},
    "registry_models": {"id": 120, "name": 96, "base": 120},
    "registry_promotions": {"name": 96},
    "registry_pins": {"target": 120, "name": 96},
}
"""Columns of names and ids, with their lengths."""


def upgrade() -> None:
    """Draw the identity of this registry."""
    identity = op.create_table("registry_identity", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(identity, [{"id": uuid.uuid4().hex}])
    if op.get_bind().dialect.name == "postgresql":
        for table, columns in NAMES.items():
            for column, length in columns.items():
                op.execute(f'ALTER TABLE {table} ALTER COLUMN {column} TYPE VARCHAR({length}) COLLATE "C"')


def downgrade() -> None:
    """Forget it."""
    op.drop_table("registry_identity")
