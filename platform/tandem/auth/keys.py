"""API keys in the database: creation, rotation, revocation, and the changes that gateways poll for.

A key is 256 random bits, shown once. The database has its SHA-256 alone: so many random bits need no salt and no slow hash.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import func, literal, select, tuple_
from sqlalchemy.orm import Session

from tandem.auth.principal import Limits, Principal, Role
from tandem.auth.tenants import DEFAULT_TENANT, TenantStore, check_tenant, is_active
from tandem.db.audit import Change, record_change
from tandem.db.schema import ApiKeyRow, UtcDateTime
from tandem.errors import AuthError, ConfigError, KeyMadeBeforeError, UnknownKeyError, did_you_mean
from tandem.registry.conditions import ALWAYS, Condition, remember, result_of_earlier

PREFIX = "tdm-"
KEY_ID = re.compile(r"key_[0-9a-f]{12}")
"""Ids of keys."""
SECRET_BYTES = 32
LONGEST_LIFE = timedelta(days=100 * 365)
"""Longest time for which a key can be made, and an old one be accepted after a rotation."""
PAGE = 5000
"""Keys that gateways read at once."""
log = logging.getLogger(__name__)
LONGEST_SECRET = 128
"""Longest text that is hashed, in characters: ours have 47."""
LONGEST_MODEL, MOST_MODELS = 256, 1000
"""Longest name in a key's list of models, in characters, and most names."""

Keys = list["ApiKey"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """One key, without its secret."""

    id: str
    """Its name in lists, logs and commands: `key_` and 12 hexadecimal digits."""
    name: str
    hint: str
    """The first characters of the secret, by which its owner knows it."""
    tenant: str
    role: Role
    models: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    digest: str = field(repr=False)
    revision: int = 0
    """The registry's revision at its last change."""
    origin: str = ""
    """The first key of the chain of rotations that led to it."""

    def state(self, now: datetime) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"

    @property
    def principal(self) -> Principal:
        """The principal of requests with this key."""
        return Principal(
            key_id=self.id,
            tenant=self.tenant,
            role=self.role,
            models=self.models,
            limits=self.limits,
            origin=self.origin,
        )

    def to_json(self) -> dict[str, Any]:
        """The key for lists: neither its secret nor its digest."""
        return {
            "id": self.id,
            "object": "api_key",
            "name": self.name,
            "hint": self.hint,
            "tenant": self.tenant,
            "role": str(self.role),
            "models": list(self.models),
            "limits": self.limits.to_json(),
            "created_at": self.created_at.isoformat(),
            "expires_at": self.expires_at.isoformat() if self.expires_at else None,
            "revoked_at": self.revoked_at.isoformat() if self.revoked_at else None,
            "state": self.state(datetime.now(UTC)),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class NewKey:
    """A new key with its secret, which cannot be read again."""

    key: ApiKey
    secret: str = field(repr=False)


class Cursor(NamedTuple):
    """A place in the order of changes."""

    revision: int = -1
    id: str = ""


class ChangedKey(NamedTuple):
    """The fields of a key that a gateway needs."""

    digest: str
    principal: Principal | None
    """Principal of its requests; None: it is not accepted."""
    expires_at: datetime | None


ChangedKeys = list[ChangedKey]


def digest(secret: str) -> str:
    """SHA-256 of a secret, as the database keeps it."""
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyStore(TenantStore):
    """The keys and tenants in a registry's database. Every change is in the audit log, and raises the registry's revision."""

    def create(
        self,
        name: str,
        *,
        tenant: str = DEFAULT_TENANT,
        role: Role = Role.USER,
        models: Sequence[str] = (),
        limits: Limits | None = None,
        expires_in: timedelta | None = None,
        by: str,
        address: str | None = None,
        once: Condition = ALWAYS,
    ) -> NewKey:
        """Make a key. AuthError for values that no key can have, KeyMadeBeforeError where one was made under `once`.

        `by` and `address`: the caller and its address, for the audit log.
        """
        check_tenant(tenant)
        if not name.isprintable() or not 1 <= len(name) <= 96:
            raise AuthError("A key's name has 1 to 96 printable characters.")
        if expires_in is not None and not timedelta(0) < expires_in <= LONGEST_LIFE:
            raise AuthError(f"A key expires after 1 second to {LONGEST_LIFE.days // 365} years, or never.")
        _check_models(models)
        with self._writing() as (session, revision):
            _check_first(session, once)
            new_key = self._add(
                session,
                revision,
                name=name,
                tenant=tenant,
                role=role,
                models=list(models),
                limits=(limits or Limits()).to_json(),
                expires_in=expires_in,
            )
            change = Change(
                by=by, action="keys.create", target=new_key.key.id, address=address, after=new_key.key.to_json()
            )
            record_change(session, change)
            remember(session, once, new_key.key.id)
        return new_key

    def list(self, *, tenant: str | None = None, every: bool = False) -> Keys:
        """The keys, oldest first: those that are active, or all; `tenant`: of one tenant only."""
        return self.page(tenant=tenant, every=every, limit=None)

    def page(
        self, *, tenant: str | None = None, every: bool = False, after: str | None = None, limit: int | None = 100
    ) -> Keys:
        """At most `limit` keys (None: all), oldest first, after the one with the id `after`; the rest is as in `list`."""
        row = ApiKeyRow
        query = select(row).order_by(row.created_at, row.id).limit(limit)
        if tenant is not None:
            query = query.where(row.tenant == tenant)
        if not every:
            query = query.where(is_active())
        with self._reading() as session:
            if after is not None:
                last_row = session.get(row, after)
                if last_row is None:
                    raise UnknownKeyError(f"There is no key {after[:80]!r}; `after` is the id of a page's last key.")
                query = query.where(
                    tuple_(row.created_at, row.id) > tuple_(literal(last_row.created_at, UtcDateTime), last_row.id)
                )
            return [_to_api_key(matching_row) for matching_row in session.scalars(query)]

    def get(self, id_or_name: str) -> ApiKey:
        """One key, by its id, or by its name if one active key has it; AuthError otherwise."""
        with self._reading() as session:
            return _to_api_key(_find(session, id_or_name))

    def revoke(self, id_or_name: str, *, by: str, address: str | None = None) -> ApiKey:
        """End a key; gateways refuse it within seconds. A key that has ended stays as it is."""
        with self._writing() as (session, revision):
            row = _find(session, id_or_name)
            old_key = _to_api_key(row)
            if row.revoked_at is None:
                row.revoked_at, row.revision = datetime.now(UTC), revision
                old_json, new_json = old_key.to_json(), _to_api_key(row).to_json()
                change = Change(
                    by=by, action="keys.revoke", target=row.id, address=address, before=old_json, after=new_json
                )
                record_change(session, change)
            return _to_api_key(row)

    def rotate(
        self, id_or_name: str, *, overlap: timedelta, by: str, address: str | None = None, once: Condition = ALWAYS
    ) -> NewKey:
        """A new key with the same rights and limits, in which what the old one has used today and this minute counts too.

        The old one is accepted for `overlap` more. AuthError if it has ended, KeyMadeBeforeError where a key was made under
        `once`.
        """
        now = datetime.now(UTC)
        with self._writing() as (session, revision):
            _check_first(session, once)
            row = _find(session, id_or_name)
            old_key = _to_api_key(row)
            if old_key.state(now) != "active":
                raise AuthError(f"{row.id} is {old_key.state(now)}; make a new key: `tandem keys create {row.name}`.")
            expires_at = now + min(max(overlap, timedelta(0)), LONGEST_LIFE)
            lifetime = None if row.lifetime_s is None else timedelta(seconds=row.lifetime_s)
            row.expires_at = expires_at if row.expires_at is None else min(expires_at, row.expires_at)
            row.revision = revision
            new_key = self._add(
                session,
                revision,
                name=row.name,
                tenant=row.tenant,
                role=Role(row.role),
                models=list(row.models),
                limits=dict(row.limits),
                expires_in=lifetime,
                origin=row.origin,
            )
            old_json, new_json = old_key.to_json(), new_key.key.to_json()
            change = Change(
                by=by, action="keys.rotate", target=row.id, address=address, before=old_json, after=new_json
            )
            record_change(session, change)
            remember(session, once, new_key.key.id)
        return new_key

    def accepts(self, secret: str) -> bool:
        """Whether a secret is that of an active key."""
        with self._reading() as session:
            row = session.scalar(select(ApiKeyRow).where(ApiKeyRow.digest == digest(secret)))
            return row is not None and _to_api_key(row).state(datetime.now(UTC)) == "active"

    def count_active(self) -> int:
        """The number of keys that are accepted now."""
        query = select(func.count()).select_from(ApiKeyRow).where(is_active())
        with self._reading() as session:
            return session.execute(query).scalar_one()

    def changes(self, after: Cursor) -> tuple[Cursor, ChangedKeys]:
        """A page of the keys that have changed since `after`, in the order of their changes, and where the next page begins.

        An empty page: there are no more. Writers raise the registry's revision one at a time, so none is missed.
        """
        row = ApiKeyRow
        columns = (
            row.revision,
            row.id,
            row.digest,
            row.tenant,
            row.role,
            row.models,
            row.limits,
            row.expires_at,
            row.revoked_at,
            row.origin,
        )
        query = select(*columns).where(tuple_(row.revision, row.id) > tuple_(after.revision, after.id))
        with self._reading() as session:
            rows = session.execute(query.order_by(row.revision, row.id).limit(PAGE)).all()
        changed_keys = [ChangedKey(key_row.digest, _principal_of(key_row), key_row.expires_at) for key_row in rows]
        return Cursor(rows[-1].revision, rows[-1].id) if rows else after, changed_keys

    def _add(
        self,
        session: Session,
        revision: int,
        *,
        role: Role,
        expires_in: timedelta | None,
        origin: str | None = None,
        **values: Any,
    ) -> NewKey:
        now = datetime.now(UTC)
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        key_id = f"key_{secrets.token_hex(6)}"
        row = ApiKeyRow(
            id=key_id,
            origin=origin or key_id,
            digest=digest(secret),
            hint=secret[: len(PREFIX) + 4],
            role=str(role),
            created_at=now,
            expires_at=None if expires_in is None else now + expires_in,
            lifetime_s=None if expires_in is None else int(expires_in.total_seconds()),
            revision=revision,
            **values,
        )
        session.add(row)
        session.flush()
        return NewKey(key=_to_api_key(row), secret=secret)


def _check_models(models: Sequence[str]) -> None:
    """AuthError for a list of models that has too many names, or one that no model can have."""
    if len(models) > MOST_MODELS:
        raise AuthError(f"The list of models has {len(models)} names; a key has at most {MOST_MODELS}.")
    for index, name in enumerate(models):
        if not name.isprintable() or not 1 <= len(name) <= LONGEST_MODEL:
            raise AuthError(f"models[{index}] must have 1 to {LONGEST_MODEL} printable characters; it has {len(name)}.")


def _principal_of(row: Any) -> Principal | None:
    """The principal of a row; None for a revoked key, and for one that this version of Tandem cannot read."""
    if row.revoked_at is not None:
        return None
    try:
        limits = Limits.from_json(row.limits)
        return Principal(
            key_id=row.id,
            tenant=row.tenant,
            role=Role(row.role),
            models=tuple(row.models),
            limits=limits,
            origin=row.origin,
        )
    except (ConfigError, ValueError, TypeError) as error:
        log.warning("The API key %s is refused, because it cannot be read: %s", row.id, error)
        return None


def _find(session: Session, id_or_name: str) -> ApiKeyRow:
    row = session.get(ApiKeyRow, id_or_name)
    if row is not None:
        return row
    matching_rows = session.scalars(select(ApiKeyRow).where(ApiKeyRow.name == id_or_name, is_active())).all()
    if len(matching_rows) == 1:
        return matching_rows[0]
    if matching_rows:
        ids = ", ".join(matching_row.id for matching_row in matching_rows)
        raise AuthError(f"{len(matching_rows)} active keys are called {id_or_name!r}: {ids}. Give the id.")
    ids_and_names = [*session.scalars(select(ApiKeyRow.id)), *session.scalars(select(ApiKeyRow.name))]
    suggestion = did_you_mean(id_or_name, ids_and_names)
    raise UnknownKeyError(f"There is no active key {id_or_name[:80]!r}.{suggestion} `tandem keys ls --all` lists them.")


def _to_api_key(row: ApiKeyRow) -> ApiKey:
    return ApiKey(
        id=row.id,
        name=row.name,
        hint=row.hint,
        tenant=row.tenant,
        role=Role(row.role),
        models=tuple(row.models),
        limits=Limits.from_json(row.limits),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        digest=row.digest,
        revision=row.revision,
        origin=row.origin,
    )


def _check_first(session: Session, once: Condition) -> None:
    """KeyMadeBeforeError where a key was made under the same idempotency key."""
    if (earlier := result_of_earlier(session, once)) is not None:
        raise KeyMadeBeforeError(
            f"This request has made {earlier} before, whose secret was told then and is not kept. If it is lost, revoke "
            f"{earlier} and make another key."
        )
