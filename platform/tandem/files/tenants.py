"""Bytes of each tenant's files: taken and given back in the transaction that records a file or a part."""

from __future__ import annotations

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from tandem.db.inserts import insert_into
from tandem.db.schema import FileTenantRow
from tandem.errors import FileQuotaError


def take_bytes(session: Session, tenant: str, size_bytes: int, quota_bytes: int) -> None:
    """Count bytes of a new file or part; FileQuotaError if the tenant would have more than `quota_bytes`.

    The row stays locked until the transaction ends, so that two uploads cannot share the last bytes.
    """
    session.execute(insert_into(session, FileTenantRow).values(tenant=tenant, bytes=0).on_conflict_do_nothing())
    taken = session.execute(
        update(FileTenantRow)
        .where(FileTenantRow.tenant == tenant, FileTenantRow.bytes + size_bytes <= quota_bytes)
        .values(bytes=FileTenantRow.bytes + size_bytes)
    )
    if not taken.rowcount:  # type: ignore[attr-defined]
        used = session.get_one(FileTenantRow, tenant).bytes
        raise quota_error(tenant, size_bytes, used, quota_bytes)


def lock_tenant(session: Session, tenant: str) -> None:
    """Wait for other transactions that count what a tenant with files has, and let those that follow wait for this one."""
    session.execute(select(FileTenantRow.tenant).where(FileTenantRow.tenant == tenant).with_for_update())


def give_back_bytes(session: Session, tenant: str, size_bytes: int) -> None:
    """Count the bytes of a file or part that is removed no more."""
    session.execute(
        update(FileTenantRow).where(FileTenantRow.tenant == tenant).values(bytes=FileTenantRow.bytes - size_bytes)
    )


def quota_error(tenant: str, size_bytes: int, used_bytes: int, quota_bytes: int) -> FileQuotaError:
    """The error for bytes that do not fit."""
    return FileQuotaError(
        f"The files of the tenant {tenant} have {used_bytes:,} bytes; {size_bytes:,} more would exceed {quota_bytes:,} "
        "(gateway.files.tenant_bytes). Delete files first."
    )
