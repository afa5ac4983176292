"""Tenants in the database: the limits that all keys of a tenant share."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, func, select

from tandem.auth.principal import NOTHING, UNLIMITED, Limits
from tandem.db.audit import Change, record_change
from tandem.db.schema import ApiKeyRow, TenantRow
from tandem.errors import AuthError, ConfigError
from tandem.registry.connection import RegistryConnection

DEFAULT_TENANT = "default"
TENANT_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
log = logging.getLogger(__name__)


class TenantSummary(NamedTuple):
    """A tenant that has limits or active keys."""

    name: str
    limits: Limits
    keys: int
    """Number of its active keys."""


class TenantStore(RegistryConnection):
    """The tenants in a registry's database. Every change is in the audit log, and raises the registry's revision."""

    def tenants(self) -> dict[str, Limits]:
        """The limits of all tenants that have any; NOTHING of one whose row this version of Tandem cannot read."""
        with self._reading() as session:
            rows = session.scalars(select(TenantRow)).all()
        return {row.name: _tenant_limits(row) for row in rows}

    def tenant_summaries(self) -> Sequence[TenantSummary]:
        """All tenants that have limits or active keys, by name."""
        limits = self.tenants()
        query = select(ApiKeyRow.tenant, func.count().label("num_keys")).where(is_active()).group_by(ApiKeyRow.tenant)
        with self._reading() as session:
            num_keys = {row.tenant: row.num_keys for row in session.execute(query)}
        return [
            TenantSummary(name, limits.get(name, UNLIMITED), num_keys.get(name, 0))
            for name in sorted(limits.keys() | num_keys.keys())
        ]

    def limit_tenant(self, tenant: str, limits: Limits, *, by: str, address: str | None = None) -> None:
        """Replace the limits of a tenant, which all its keys share; gateways follow within seconds. AuthError for a name that no
        tenant can have.
        """
        check_tenant(tenant)
        with self._writing() as (session, _):
            row = session.get(TenantRow, tenant)
            before = None if row is None else dict(row.limits)
            if row is None:
                session.add(TenantRow(name=tenant, limits=limits.to_json()))
            else:
                row.limits = limits.to_json()
            record_change(
                session,
                Change(
                    by=by,
                    address=address,
                    action="tenants.limit",
                    target=tenant,
                    before=before,
                    after=limits.to_json(),
                ),
            )


def check_tenant(tenant: str) -> None:
    """AuthError for a name that no tenant can have."""
    if not TENANT_PATTERN.fullmatch(tenant):
        raise AuthError(
            f"The tenant {tenant[:80]!r} is not valid. Use up to 63 of a-z, 0-9, - and _, beginning with a letter or digit."
        )


def is_active() -> ColumnElement[bool]:
    """The condition that a row's key is accepted now."""
    row = ApiKeyRow
    return row.revoked_at.is_(None) & (row.expires_at.is_(None) | (row.expires_at > datetime.now(UTC)))


def _tenant_limits(row: TenantRow) -> Limits:
    try:
        return Limits.from_json(row.limits)
    except (ConfigError, TypeError) as error:
        log.warning("Requests of the tenant %s are refused, because its limits cannot be read: %s", row.name, error)
        return NOTHING
