"""Stored answers in SQLite and PostgreSQL: lookup by tenant, lists, chains, quota, deletion, expiry, backup."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from postgresql import Server
from sqlalchemy import create_engine, update
from sqlalchemy.orm import Session

from tandem.db.backup import backup, restore
from tandem.db.database import parse_url
from tandem.db.schema import StoredAnswerRow
from tandem.registry import Registry, upgrade
from tandem.stored import store as module
from tandem.stored.content import pack
from tandem.stored.records import AnswerKind, NewAnswer
from tandem.stored.store import StoredAnswers

QUOTA = 10**6
RESPONSE, CHAT = AnswerKind.RESPONSE, AnswerKind.CHAT


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoredAnswers]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/tandem.db"
    else:
        server: Server = request.getfixturevalue("postgresql_server")
        url = server.create(uuid.uuid4().hex)
        upgrade(url)
    with Registry(url) as registry, StoredAnswers.at(registry.address) as opened:
        yield opened


def answer(id_: str, *, kind: AnswerKind = RESPONSE, tenant: str = "lab", text: str = "x", **values: Any) -> NewAnswer:
    raw_bytes, content = pack(json.dumps({"input": text}).encode(), json.dumps({"id": id_, "output": []}).encode())
    options: dict[str, Any] = {"model": "base", "answered_model": "base@1", "lifetime_days": 30, "key_id": "", **values}
    return NewAnswer(id=id_, tenant=tenant, kind=kind, raw_bytes=raw_bytes, content=content, **options)


def add(store: StoredAnswers, *answers: NewAnswer) -> None:
    for each in answers:
        assert store.add(each, tenant_bytes=QUOTA)


def expire(store: StoredAnswers, id_: str) -> None:
    engine = create_engine(parse_url(store.url))
    with Session(engine) as session, session.begin():
        past = datetime.now(UTC) - timedelta(seconds=1)
        session.execute(update(StoredAnswerRow).where(StoredAnswerRow.id == id_).values(expires_at=past))
    engine.dispose()


def test_an_answer_is_found_by_its_tenant_and_kind_alone(store: StoredAnswers) -> None:
    add(store, answer("a", text="one", metadata={"k": "v"}))
    found = store.get("lab", RESPONSE, "a")
    assert found is not None and found.request == {"input": "one"} and found.answer == {"id": "a", "output": []}
    assert found.metadata == {"k": "v"} and found.previous_id is None
    assert store.get("other", RESPONSE, "a") is None and store.get("lab", CHAT, "a") is None
    # Ids that clients choose do not let one tenant replace the answers of another.
    add(store, answer("a", tenant="other", text="two"))
    assert [store.get(tenant, RESPONSE, "a").request["input"] for tenant in ("lab", "other")] == ["one", "two"]  # type: ignore[union-attr]


def test_an_answer_with_the_same_id_replaces_the_first_one_and_its_bytes(store: StoredAnswers) -> None:
    add(store, answer("a", text="one" * 1000), answer("a", text="two"))
    assert store.get("lab", RESPONSE, "a").request == {"input": "two"}  # type: ignore[union-attr]
    assert store.used_bytes("lab") == len(answer("a", text="two").content)


def test_an_answer_with_the_same_idempotency_key_replaces_the_first_one_of_its_tenant(store: StoredAnswers) -> None:
    add(store, answer("a", idempotency_key="k"), answer("b"), answer("a", tenant="other", idempotency_key="k"))
    assert store.of_key("lab", RESPONSE, "k") == store.get("lab", RESPONSE, "a")
    assert store.of_key("lab", CHAT, "k") is None and store.of_key("lab", RESPONSE, "l") is None
    add(store, answer("c", idempotency_key="k"))
    assert [store.get("lab", RESPONSE, id_) is None for id_ in "abc"] == [True, False, False]
    assert store.used_bytes("lab") == len(answer("b").content) + len(answer("c").content)
    assert store.of_key("other", RESPONSE, "k") == store.get("other", RESPONSE, "a")


def test_answers_beyond_the_quota_are_not_stored_until_others_are_deleted(store: StoredAnswers) -> None:
    size = len(answer("a").content)
    assert store.add(answer("a"), tenant_bytes=size)
    assert not store.add(answer("b"), tenant_bytes=size) and store.get("lab", RESPONSE, "b") is None
    assert store.add(answer("b", tenant="other"), tenant_bytes=size), "each tenant has its own quota"
    assert store.delete("lab", RESPONSE, "a") and not store.delete("lab", RESPONSE, "a")
    assert store.used_bytes("lab") == 0 and store.add(answer("b"), tenant_bytes=size)


def test_lists_have_filters_and_pages_in_both_orders(store: StoredAnswers) -> None:
    for number in range(5):
        labels = {"parity": "odd" if number % 2 else "even", "a b.c": "1"}
        add(store, answer(f"c{number}", kind=CHAT, model="red" if number == 4 else "base", metadata=labels))
    add(store, answer("r", kind=RESPONSE), answer("c9", kind=CHAT, tenant="other"))

    def ids(**options: Any) -> list[str]:
        page = store.page("lab", CHAT, **{"limit": 10, **options})
        assert page is not None
        return [each.id for each in page.answers]

    assert ids() == ["c0", "c1", "c2", "c3", "c4"] and ids(newest_first=True, limit=2) == ["c4", "c3"]
    assert ids(after="c1", limit=2) == ["c2", "c3"] and ids(after="c1", newest_first=True) == ["c0"]
    assert ids(metadata={"parity": "odd", "a b.c": "1"}) == ["c1", "c3"] and ids(metadata={"none": "1"}) == []
    assert ids(model="red") == ["c4"] and len(ids(model="base@1")) == 5
    assert store.page("lab", CHAT, limit=1, after="nobody") is None
    assert store.set_metadata("lab", CHAT, "c0", {"parity": "odd"}).metadata == {"parity": "odd"}  # type: ignore[union-attr]
    assert ids(metadata={"parity": "odd"}) == ["c0", "c1", "c3"]
    assert store.set_metadata("other", CHAT, "c0", {}) is None


def test_a_page_of_large_answers_has_fewer_and_the_next_ones_follow(
    store: StoredAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, *(answer(f"c{number}", kind=CHAT, text="x" * 1000) for number in range(5)))
    found = []
    for page_bytes, limit, expected in ((2500, 10, 2), (10, 10, 1), (10_000, 1, 1), (10_000, 10, 1)):
        monkeypatch.setattr(module, "PAGE_BYTES", page_bytes)
        page = store.page("lab", CHAT, limit=limit, after=found[-1] if found else None)
        assert page is not None and len(page.answers) == expected
        found += [each.id for each in page.answers]
        assert page.has_more == (len(found) < 5)
    assert found == [f"c{number}" for number in range(5)]
    page = store.page("lab", CHAT, limit=10, after="c4")
    assert page is not None and page.answers == () and not page.has_more


def test_a_chain_is_oldest_first_and_names_what_is_missing(store: StoredAnswers) -> None:
    add(store, answer("r0"), answer("r1", previous_id="r0"), answer("r2", previous_id="r1"))
    limits = {"max_turns": 3, "max_bytes": QUOTA}
    chain = store.chain("lab", "r2", **limits)
    assert [each.id for each in chain.answers] == ["r0", "r1", "r2"] and (chain.missing, chain.num_turns) == (None, 3)
    assert store.chain("other", "r2", **limits).missing == "r2"
    store.delete("lab", RESPONSE, "r0")
    chain = store.chain("lab", "r2", **limits)
    assert (chain.answers, chain.missing) == ((), "r0")


def test_a_chain_that_is_too_long_or_too_large_is_not_read(store: StoredAnswers) -> None:
    add(store, *(answer(f"r{n}", previous_id=f"r{n - 1}" if n else None) for n in range(5)))
    long = store.chain("lab", "r4", max_turns=4, max_bytes=QUOTA)
    assert (long.answers, long.missing, long.num_turns) == ((), None, 5)
    large = store.chain("lab", "r4", max_turns=5, max_bytes=100)
    assert (large.answers, large.missing) == ((), None) and large.raw_bytes > 100
    # Ids are given by clients too: one that leads back to itself ends at the limit.
    add(store, answer("r0", previous_id="r4"))
    assert store.chain("lab", "r4", max_turns=5, max_bytes=QUOTA).answers == ()


def test_expired_answers_do_not_exist_and_are_deleted_with_their_bytes(store: StoredAnswers) -> None:
    add(store, answer("r0"), answer("r1", previous_id="r0"), answer("r0", tenant="other"))
    expire(store, "r0")
    assert store.get("lab", RESPONSE, "r0") is None
    assert store.chain("lab", "r1", max_turns=3, max_bytes=QUOTA).missing == "r0"
    assert (store.expire(), store.expire()) == (2, 0)
    assert store.used_bytes("other") == 0 and store.used_bytes("lab") == len(answer("r1", previous_id="r0").content)


def test_a_backup_has_the_stored_answers(store: StoredAnswers, tmp_path: Path) -> None:
    add(store, answer("r0", text="hello"))
    backup(store.url, tmp_path / "copy.gz")
    restored = f"sqlite:///{tmp_path}/restored.db"
    restore(restored, tmp_path / "copy.gz")
    with StoredAnswers(restored) as copy:
        found = copy.get("lab", RESPONSE, "r0")
    assert found is not None and found.request == {"input": "hello"}
