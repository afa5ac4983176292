"""Durable work: jobs, their events, queue items, leases of leaders."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ID = sa.String(120).with_variant(sa.String(120, collation="C"), "postgresql")


def _leased_work() -> list[sa.Column[Any]]:
    return [
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("not_before", sa.DateTime()),
        sa.Column("deadline", sa.DateTime()),
        sa.Column("idempotency_key", sa.String(64)),
        sa.Column("lease_owner", sa.String(120)),
        sa.Column("lease_until", sa.DateTime()),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("started_at", sa.DateTime()),
        sa.Column("ended_at", sa.DateTime()),
        sa.Column("error", sa.Text()),
        sa.Column("result", sa.JSON()),
    ]


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "jobs",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", ID, nullable=False, unique=True),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("content_hash", sa.String(64)),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("cpus_per_worker", sa.Double(), nullable=False),
        sa.Column("gpus_per_worker", sa.Double(), nullable=False),
        sa.Column("min_workers", sa.Integer(), nullable=False),
        sa.Column("max_workers", sa.Integer(), nullable=False),
        sa.Column("workers", sa.Integer()),
        sa.Column("runner", sa.String(16), nullable=False),
        sa.Column("handle", sa.String(255)),
        sa.Column("reason", sa.Text()),
        sa.Column("parent", ID),
        sa.Column("last_event", sa.Integer(), nullable=False),
        *_leased_work(),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_jobs_idempotency_key"),
        sa.UniqueConstraint("tenant", "kind", "content_hash", name="uq_jobs_content_hash"),
    )
    op.create_index("ix_jobs_state", "jobs", ["state", "priority", "number"])
    op.create_index("ix_jobs_tenant", "jobs", ["tenant", "number"])
    op.create_index("ix_jobs_deadline", "jobs", ["state", "deadline"])
    op.create_index("ix_jobs_parent", "jobs", ["parent"])
    op.create_table(
        "job_events",
        sa.Column("job", ID, sa.ForeignKey("jobs.id", name="fk_job_events_job", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("event", sa.JSON(), nullable=False),
    )
    op.create_table(
        "queue_items",
        sa.Column("number", NUMBER, primary_key=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("job", ID, sa.ForeignKey("jobs.id", name="fk_queue_items_job", ondelete="CASCADE")),
        sa.Column("position", sa.Integer()),
        sa.Column("queue", ID, nullable=False),
        sa.Column("adapter", ID, nullable=False),
        sa.Column("payload", sa.JSON()),
        sa.Column("payload_reference", sa.String(4096)),
        sa.Column("result_reference", sa.String(4096)),
        *_leased_work(),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_queue_items_idempotency_key"),
        sa.UniqueConstraint("job", "position", name="uq_queue_items_position"),
    )
    op.create_index("ix_queue_items_claim", "queue_items", ["queue", "state", "priority", "number"])
    op.create_index("ix_queue_items_lease", "queue_items", ["state", "lease_until"])
    op.create_index("ix_queue_items_deadline", "queue_items", ["state", "deadline"])
    op.create_index("ix_queue_items_job", "queue_items", ["job", "state"])
    op.create_table(
        "leaders",
        sa.Column("role", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(120), nullable=False),
        sa.Column("term", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.DateTime(), nullable=False),
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("leaders", "queue_items", "job_events", "jobs"):
        op.drop_table(table)
