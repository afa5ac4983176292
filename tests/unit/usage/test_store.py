"""Usage in the database: batches are added exactly once, and sums are those of the records."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from postgresql import Server
from sqlalchemy import event

from tandem.auth import Limits
from tandem.auth.keys import KeyStore
from tandem.db.database import open_database
from tandem.errors import ConfigError, RegistryUnreachableError
from tandem.usage import UsageCounts, UsageKey, UsageLabels, UsageStore, UsageWriter

CHAT = UsageLabels("key_1", "lab", "base@1", "red@1", "/v1/chat/completions")
NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UsageStore]:
    url = f"sqlite:///{tmp_path}/tandem.db"
    if request.param == "postgresql":
        server: Server = request.getfixturevalue("postgresql_server")
        url = server.create(uuid.uuid4().hex)
    open_database(url, create=True).dispose()
    with UsageStore(url) as opened:
        yield opened


def test_batches_add_up_and_a_repeated_batch_changes_nothing(store: UsageStore):
    batch = {UsageKey(NOON, CHAT): UsageCounts(2, 30, 7)}
    assert store.add("one", 1, batch) is True
    assert store.add("one", 1, batch) is False
    assert store.add("one", 2, batch) is True
    assert store.add("two", 1, {UsageKey(NOON, CHAT): UsageCounts(1, 1, 1, 1)}) is True
    (row,) = store.sums(("key_id", "adapter"))
    assert row == {
        "key_id": "key_1", "adapter": "red@1",
        "requests": 5, "prompt_tokens": 61, "completion_tokens": 15, "estimated_requests": 1,
    }  # fmt: skip


def test_tokens_of_a_rotated_key_count_for_its_successor(store: UsageStore):
    with KeyStore(store.url) as keys:
        first = keys.create("service", limits=Limits(tokens_per_day=100), by="ann").key
        second = keys.rotate(first.id, overlap=timedelta(hours=1), by="ann").key
        third = keys.rotate(second.id, overlap=timedelta(hours=1), by="ann").key
        other = keys.create("other", by="ann").key
    assert {key.principal.counted_as for key in (first, second, third)} == {first.id}
    labels = [CHAT._replace(key_id=key.id) for key in (first, second, third, other)]
    store.add("one", 1, {UsageKey(NOON, each): UsageCounts(1, 10, 1) for each in labels})
    assert store.tokens_today(NOON, {first.id, other.id}, ()) == {f"key:{first.id}": 33, f"key:{other.id}": 11}


def test_a_batch_changes_no_revision_of_the_registry(store: UsageStore):
    before = store.revision()
    store.add("one", 1, {UsageKey(NOON, CHAT): UsageCounts(1)})
    assert store.revision() == before


def test_sums_are_grouped_and_bounded_in_time(store: UsageStore):
    other = CHAT._replace(tenant="shop", key_id="key_2")
    batch = {
        UsageKey(NOON, CHAT): UsageCounts(1, 10, 1),
        UsageKey(NOON + timedelta(hours=1), CHAT): UsageCounts(1, 20, 2),
        UsageKey(NOON + timedelta(days=1), other): UsageCounts(1, 40, 4),
    }
    store.add("one", 1, batch)
    assert [(r["day"], r["prompt_tokens"]) for r in store.sums(("day",))] == [("2026-05-04", 30), ("2026-05-05", 40)]
    assert [r["prompt_tokens"] for r in store.sums((), since=NOON + timedelta(hours=1))] == [60]
    # Counts are by the hour: a time in the middle of one includes it, in whatever zone it is given.
    east = timezone(timedelta(hours=5, minutes=30))
    for since in (NOON + timedelta(minutes=75), (NOON + timedelta(minutes=75)).astimezone(east)):
        assert [r["prompt_tokens"] for r in store.sums((), since=since)] == [60]
    assert [r["prompt_tokens"] for r in store.sums((), until=NOON + timedelta(hours=1))] == [10]
    assert [r["hour"] for r in store.sums(("hour",), tenant="shop")] == ["2026-05-05T12:00:00+00:00"]
    assert store.sums((), since=NOON + timedelta(days=9))[0]["requests"] == 0
    with pytest.raises(ConfigError, match=r"no column 'modle'\. Did you mean 'model'\?"):
        store.sums(("modle",))


def test_tokens_of_today_are_those_since_midnight_of_the_named_keys_and_tenants(store: UsageStore):
    other = CHAT._replace(key_id="key_2")
    batch = {
        UsageKey(NOON.replace(hour=0), CHAT): UsageCounts(1, 10, 1),
        UsageKey(NOON, other): UsageCounts(1, 20, 2),
        UsageKey(NOON - timedelta(days=1), CHAT): UsageCounts(1, 500, 500),
    }
    store.add("one", 1, batch)
    assert store.tokens_today(NOON, {"key_1"}, {"lab"}) == {"key:key_1": 11, "tenant:lab": 33}
    assert store.tokens_today(NOON, {f"key_{number}" for number in range(1200)}, ()) == {
        "key:key_1": 11,
        "key:key_2": 22,
    }
    assert store.tokens_today(NOON, (), ()) == {}


class Unreliable(UsageStore):
    """A database whose answer is lost twice: once after it has written the batch, once before."""

    losses = 2

    def add(self, writer: str, sequence: int, batch: object) -> bool:
        self.losses -= 1
        if self.losses == 1:
            super().add(writer, sequence, batch)  # type: ignore[arg-type]
        if self.losses >= 0:
            raise RegistryUnreachableError("no connection")
        return super().add(writer, sequence, batch)  # type: ignore[arg-type]


async def test_a_writer_loses_and_repeats_nothing_where_the_database_fails(store: UsageStore):
    writer = UsageWriter(Unreliable(store.url))
    writer.add(CHAT, UsageCounts(1, 5, 5))
    for _ in range(2):
        with pytest.raises(RegistryUnreachableError):
            await writer.flush()
        writer.add(CHAT, UsageCounts(1, 1, 1))
    await writer.stop()
    assert store.sums(())[0] == {
        "requests": 3, "prompt_tokens": 7, "completion_tokens": 7, "estimated_requests": 0
    }  # fmt: skip


def labels(count: int) -> list[UsageLabels]:
    return [CHAT._replace(key_id=f"key_{number}") for number in range(count)]


def test_a_batch_is_one_statement_however_many_rows_it_has(store: UsageStore):
    store.add("one", 1, {UsageKey(NOON, CHAT): UsageCounts(1)})
    statements: list[str] = []
    event.listen(store._engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    assert store.add("one", 2, {UsageKey(NOON, each): UsageCounts(1, 2, 3) for each in labels(500)})
    assert len([each for each in statements if each.startswith("INSERT INTO usage ")]) == 1 and len(statements) <= 4
    # Of a batch that is too large for one, nothing is left out.
    assert store.add("one", 3, {UsageKey(NOON, each): UsageCounts(1, 2, 3) for each in labels(2300)})
    assert store.sums(())[0]["requests"] == 1 + 500 + 2300


def test_writers_of_the_same_rows_do_not_wait_for_each_other_for_ever(store: UsageStore):
    forward = {UsageKey(NOON, each): UsageCounts(1) for each in labels(50)}
    batches = {"one": forward, "two": dict(reversed(forward.items()))}

    def write(writer: str) -> None:
        with UsageStore(store.url) as own:
            for sequence in range(1, 11):
                own.add(writer, sequence, batches[writer])

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, batches))
    assert store.sums(())[0]["requests"] == 2 * 10 * 50


async def test_a_writer_keeps_no_connection_between_batches(store: UsageStore):
    own = UsageStore(store.url)
    writer = UsageWriter(own)
    writer.add(CHAT, UsageCounts(1))
    await writer.flush()
    assert own._engine.pool.checkedin() == own._engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    await writer.stop()


async def test_a_writer_writes_less_often_where_the_database_is_slow(store: UsageStore):
    class Slow(UsageStore):
        def add(self, *args: object) -> bool:
            time.sleep(0.3)
            return super().add(*args)  # type: ignore[arg-type]

    writer = UsageWriter(Slow(store.url))
    fast = [writer.pause_s for _ in range(20)]
    assert len(set(fast)) > 1 and all(1.5 <= each <= 2.5 for each in fast)
    writer.add(CHAT, UsageCounts(1))
    await writer.flush()
    assert 4.5 <= writer.pause_s <= 37.5
    await writer.stop()


def test_labels_survive_a_header_and_nothing_else_does():
    odd = UsageLabels("key_1", "täñt", 'a"b,\\', "", "/v1")
    assert UsageLabels.from_header(odd.to_header().encode("ascii")) == odd
    for wrong in (b"", b"{}", b"[1]", b"\xff", b'["a","b","c","d","e","f"]'):
        assert UsageLabels.from_header(wrong) is None
