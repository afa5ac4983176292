"""Index by which workers find and claim the waiting items of one adapter and tenant."""

from __future__ import annotations

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replace the index over all waiting items of a queue."""
    columns = ["queue", "state", "adapter", "tenant", "priority", "number"]
    op.create_index("ix_queue_items_waiting", "queue_items", columns)
    op.drop_index("ix_queue_items_claim", "queue_items")


def downgrade() -> None:
    """Put the former index back."""
    op.create_index("ix_queue_items_claim", "queue_items", ["queue", "state", "priority", "number"])
    op.drop_index("ix_queue_items_waiting", "queue_items")
