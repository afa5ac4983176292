"""Promotions with their history, pins, and indexes by which a hundred thousand adapters are listed in pages."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Until now a name meant its newest version: each version counts as promoted when it was registered."""
    op.add_column("registry_names", sa.Column("promoted", sa.String(120)))
    op.create_index("ix_registry_names_kind", "registry_names", ["kind", "name"])
    op.create_index("ix_registry_models_base_name", "registry_models", ["base", "name", "version"])
    op.create_index("ix_registry_models_kind_revision", "registry_models", ["kind", "revision"])
    op.create_table(
        "registry_promotions",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column(
            "name",
            sa.String(96),
            sa.ForeignKey("registry_names.name", name="fk_registry_promotions_name"),
            nullable=False,
        ),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("taken_back", sa.Boolean(), nullable=False),
    )
    op.create_index("ix_registry_promotions_name", "registry_promotions", ["name", "id"])
    op.create_table(
        "registry_pins",
        sa.Column("target", sa.String(120), primary_key=True),
        sa.Column(
            "name", sa.String(96), sa.ForeignKey("registry_names.name", name="fk_registry_pins_name"), nullable=False
        ),
    )
    op.create_index("ix_registry_pins_name", "registry_pins", ["name"])
    op.execute(
        "INSERT INTO registry_promotions (name, version, at, taken_back) "
        "SELECT name, version, created_at, false FROM registry_models ORDER BY revision"
    )
    op.execute(
        "UPDATE registry_names SET promoted = (SELECT id FROM registry_models AS m WHERE m.name = registry_names.name "
        "ORDER BY m.version DESC LIMIT 1)"
    )


def downgrade() -> None:
    """A name means its newest version again."""
    op.drop_index("ix_registry_pins_name", "registry_pins")
    op.drop_table("registry_pins")
    op.drop_index("ix_registry_promotions_name", "registry_promotions")
    op.drop_table("registry_promotions")
    op.drop_index("ix_registry_models_kind_revision", "registry_models")
    op.drop_index("ix_registry_models_base_name", "registry_models")
    op.drop_index("ix_registry_names_kind", "registry_names")
    with op.batch_alter_table("registry_names") as names:
        names.drop_column("promoted")
