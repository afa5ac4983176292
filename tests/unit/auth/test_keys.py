"""API keys in the database: made, found, rotated, revoked; each change is in the audit log and reaches those that poll."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from postgresql import Server
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from tandem.auth import KeyStore, Limits, Role
from tandem.auth.keys import Cursor, digest
from tandem.db.database import open_database
from tandem.db.schema import AuditRow
from tandem.errors import AuthError, ConfigError, UnknownKeyError


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path}/tandem.db"
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("postgresql_server")
        url = server.create(uuid.uuid4().hex)
    opened = open_database(url, create=True)
    yield opened
    opened.dispose()


@pytest.fixture
def keys(engine: Engine) -> KeyStore:
    return KeyStore(engine.url.render_as_string(hide_password=False))


def audited(engine: Engine) -> list[AuditRow]:
    with Session(engine) as session:
        return list(session.scalars(select(AuditRow).order_by(AuditRow.id)))


def test_a_key_has_256_bits_and_only_its_hash_is_kept(keys: KeyStore, engine: Engine) -> None:
    new = keys.create("laptop", tenant="lab", role=Role.TRAINER, models=["tiny"], by="ann@host")
    assert new.secret.startswith("tdm-") and len(new.secret) == 47
    assert new.key.digest == digest(new.secret)
    assert new.secret not in repr(new) and new.key.digest not in repr(new)
    with engine.connect() as connection:
        for table in ("api_keys", "audit_log"):
            rows = [str(tuple(row)) for row in connection.execute(text(f"SELECT * FROM {table}"))]
            assert rows and all(new.secret not in row for row in rows)
    assert new.key.principal.tenant == "lab" and new.key.principal.role is Role.TRAINER
    assert new.key.principal.may_use("tiny") and not new.key.principal.may_use("other")
    assert "digest" not in json.dumps(new.key.to_json())


def test_keys_are_found_by_id_and_by_a_name_that_one_of_them_has(keys: KeyStore) -> None:
    first = keys.create("laptop", by="ann@host").key
    assert keys.get(first.id) == keys.get("laptop") == first
    second = keys.create("laptop", by="ann@host").key
    with pytest.raises(AuthError, match=f"2 active keys are called 'laptop'.*{second.id}"):
        keys.get("laptop")
    with pytest.raises(AuthError, match="no active key 'laptpo'.*laptop"):
        keys.get("laptpo")


def test_a_revoked_key_stays_in_the_list_of_all(keys: KeyStore, engine: Engine) -> None:
    key = keys.create("laptop", by="ann@host").key
    revoked = keys.revoke(key.id, by="bob@host")
    assert revoked.state(datetime.now(UTC)) == "revoked"
    assert keys.list() == [] and [each.id for each in keys.list(every=True)] == [key.id]
    again = keys.revoke(key.id, by="bob@host")
    assert again.revoked_at == revoked.revoked_at
    assert [(row.action, row.by, row.target) for row in audited(engine)] == [
        ("keys.create", "ann@host", key.id),
        ("keys.revoke", "bob@host", key.id),
    ]
    before, after = audited(engine)[1].before, audited(engine)[1].after
    assert before is not None and after is not None
    assert before["revoked_at"] is None and after["revoked_at"] is not None


def test_a_rotated_key_is_accepted_until_the_overlap_has_passed(keys: KeyStore) -> None:
    limits = Limits(requests_per_minute=60)
    old = keys.create("service", tenant="lab", models=["tiny"], limits=limits, expires_in=timedelta(days=30), by="ann")
    new = keys.rotate("service", overlap=timedelta(hours=1), by="ann")
    assert new.secret != old.secret and new.key.id != old.key.id
    for each in ("name", "tenant", "role", "models", "limits"):
        assert getattr(new.key, each) == getattr(old.key, each)
    replaced, now = keys.get(old.key.id), datetime.now(UTC)
    assert replaced.state(now) == "active"
    assert replaced.state(now + timedelta(minutes=61)) == "expired"
    # It lives as long as the first one was made for.
    assert new.key.expires_at is not None and new.key.expires_at - now > timedelta(days=29)
    # Also when it is rotated again.
    again = keys.rotate(old.key.id, overlap=timedelta(minutes=1), by="ann")
    assert again.key.expires_at is not None and again.key.expires_at - now > timedelta(days=29)
    keys.revoke(again.key.id, by="ann")
    at_once = keys.rotate(new.key.id, overlap=timedelta(0), by="ann")
    assert keys.get(new.key.id).state(datetime.now(UTC)) == "expired"
    with pytest.raises(AuthError, match="is expired; make a new key"):
        keys.rotate(new.key.id, overlap=timedelta(0), by="ann")
    assert keys.count_active() == 2 and at_once.key.id in [key.id for key in keys.list()]


def test_who_polls_sees_each_change_once(keys: KeyStore) -> None:
    first = keys.create("one", by="ann")
    cursor, changed = keys.changes(Cursor())
    assert [key.digest for key in changed] == [first.key.digest] and changed[0].principal == first.key.principal
    assert keys.changes(cursor) == (cursor, [])
    second = keys.create("two", by="ann")
    keys.revoke("one", by="ann")
    _, changed = keys.changes(cursor)
    assert [(key.digest, key.principal) for key in changed] == [
        (second.key.digest, second.key.principal),
        (first.key.digest, None),
    ]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("x", {"tenant": "Lab A"}, "The tenant 'Lab A' is not valid"),
        ("x", {"tenant": "l" * 64}, "is not valid"),
        ("", {}, "1 to 96 printable"),
        ("a\nb", {}, "1 to 96 printable"),
        ("x", {"expires_in": timedelta(0)}, "expires after 1 second"),
    ],
)
def test_values_that_no_key_can_have_are_refused(keys: KeyStore, name: str, options: dict, said: str) -> None:
    with pytest.raises(AuthError, match=said):
        keys.create(name, by="ann", **options)
    assert keys.list(every=True) == []


def test_limits_are_read_strictly() -> None:
    assert Limits.from_json({"requests_per_minute": 5}).to_json() == {"requests_per_minute": 5}
    with pytest.raises(ConfigError, match="no limit 'request_per_minute'.*requests_per_minute"):
        Limits.from_json({"request_per_minute": 5})
    for value in (-1, 1.5, True, "5"):
        with pytest.raises(ConfigError, match="requests_per_minute is"):
            Limits(requests_per_minute=value)


def test_roles_include_those_below_them() -> None:
    assert Role.ADMIN.includes(Role.TRAINER) and Role.TRAINER.includes(Role.USER)
    assert not Role.USER.includes(Role.TRAINER) and not Role.TRAINER.includes(Role.ADMIN)


def test_pages_put_together_are_the_whole_list_and_start_after_a_key(keys: KeyStore) -> None:
    made = [keys.create(f"key {number}", tenant=f"t{number % 2}", by="ann@host").key.id for number in range(7)]
    keys.revoke(made[3], by="ann@host")
    found: list[str] = []
    while page := keys.page(after=found[-1] if found else None, limit=2):
        assert len(page) <= 2
        found += [key.id for key in page]
    assert found == [each for each in made if each != made[3]]
    assert [key.id for key in keys.page(every=True, after=made[1], limit=3)] == made[2:5]
    assert [key.id for key in keys.page(tenant="t1")] == [made[1], made[5]]
    with pytest.raises(UnknownKeyError, match="There is no key 'key_none'"):
        keys.page(after="key_none")
