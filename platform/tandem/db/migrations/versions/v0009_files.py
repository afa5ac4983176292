"""Uploaded files, their uses by jobs, bytes by tenant, and uploads in parts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    _make_files()
    _make_uploads()


def _make_files() -> None:
    op.create_table(
        "files",
        sa.Column("id", _id(), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("location", sa.String(4096)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_details", sa.String(1024)),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime()),
        sa.Column("deleted_at", sa.DateTime()),
        sa.Column("num_uses", sa.Integer(), nullable=False),
        sa.Column("check_until", sa.DateTime()),
    )
    op.create_index("ix_files_tenant_created_at", "files", ["tenant", "created_at", "id"])
    op.create_index("ix_files_status", "files", ["status"])
    op.create_index("ix_files_expires_at", "files", ["expires_at"])
    op.create_index("ix_files_deleted_at", "files", ["deleted_at"])
    op.create_table(
        "file_uses",
        sa.Column("file_id", _id(), sa.ForeignKey("files.id", name="fk_file_uses_file"), primary_key=True),
        sa.Column("job_id", sa.String(120), primary_key=True),
    )
    op.create_index("ix_file_uses_job_id", "file_uses", ["job_id"])
    op.create_table(
        "file_tenants",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
    )


def _make_uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", _id(), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=False),
        sa.Column("file_lifetime_s", sa.Integer()),
        sa.Column("part_ids", sa.JSON()),
        sa.Column("file_id", _id()),
    )
    op.create_index("ix_uploads_status_expires_at", "uploads", ["status", "expires_at"])
    op.create_table(
        "upload_parts",
        sa.Column("id", _id(), primary_key=True),
        sa.Column("upload_id", _id(), sa.ForeignKey("uploads.id", name="fk_upload_parts_upload"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("location", sa.String(4096), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_upload_parts_upload_id", "upload_parts", ["upload_id"])


def _id() -> sa.types.TypeEngine[str]:
    # Ids compare by code points everywhere (db.schema).
    return sa.String(64).with_variant(sa.String(64, collation="C"), "postgresql")


def downgrade() -> None:
    """Drop the tables."""
    for table in ("upload_parts", "uploads", "file_tenants", "file_uses", "files"):
        op.drop_table(table)
