"""A hundred thousand adapters: every question that comes with a request reads along an index, and lists come in pages."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sqlalchemy import event, insert

from tandem.db.schema import ModelRow, NameRow
from tandem.errors import UnknownModelError
from tandem.registry import Registry

COUNT = 3000


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Two models with adapters of two versions each, written by SQL."""
    registry = Registry(f"sqlite:///{tmp_path_factory.mktemp('scale')}/tandem.db")
    names = [("m1", "model", None), ("m2", "model", None)]
    names += [(f"a{i:05}", "adapter", f"m{i % 2 + 1}@1") for i in range(COUNT)]
    rows, revision = [], 0
    for name, kind, base in names:
        for version in (1, 2) if base else (1,):
            revision += 1
            rows.append(
                {
                    "id": f"{name}@{version}", "name": name, "version": version, "kind": kind, "path": "/x", "digest": "d",
                    "base": base, "rank": 8, "max_length": None, "lineage": {}, "created_at": datetime.now(UTC),
                    "revision": revision,
                }
            )  # fmt: skip
    with registry._writing() as (session, _):
        known = [{"name": n, "kind": k, "last_version": 2, "promoted": f"{n}@{2 if b else 1}"} for n, k, b in names]
        session.execute(insert(NameRow), known)
        session.execute(insert(ModelRow), rows)
    registry.pin("a00500")
    return registry


@pytest.fixture
def plans(registry):
    """How SQLite carries out each SELECT that follows."""
    found: list[str] = []

    def explain(connection, cursor, statement, parameters, context, many):
        if statement.startswith("SELECT"):
            rows = cursor.connection.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            found.extend(row[3] for row in rows)

    event.listen(registry._engine, "before_cursor_execute", explain)
    yield found
    event.remove(registry._engine, "before_cursor_execute", explain)


def unknown(registry: Registry, name: str) -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'a00500'"):
        registry.resolve(name)


@pytest.mark.parametrize(
    "ask",
    [
        lambda r: r.resolve("a00500"),
        lambda r: r.resolve("a00500@1"),
        lambda r: unknown(r, "a00500x"),
        lambda r: r.promotions("a00500"),
        lambda r: r.list("adapter", limit=10, after="a00500"),
        lambda r: r.list("model", limit=10),
        lambda r: r.list("adapter", base="m1@1", limit=10, after="a00500"),
        lambda r: r.list("adapter", True, base="m1@1", limit=10, after="a00500@1"),
        lambda r: r.newest_model(),
        lambda r: r.pinned("m1@1"),
    ],
)
def test_nothing_that_a_request_asks_scans_or_sorts_a_table(registry, plans, ask):
    ask(registry)
    assert plans
    # A SCAN of an index is a read along it, which the page's limit ends; pins are few.
    scans = [step for step in plans if "SCAN registry" in step and "USING" not in step]
    assert [*scans, *(step for step in plans if "FOR ORDER BY" in step)] == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda r: r.list("adapter", limit=10, after="a00500"),
        lambda r: r.list("adapter", base="m1@1", limit=10, after="a00500"),
        lambda r: r.list("adapter", True, base="m1@1", limit=10, after="a00500@1"),
    ],
)
def test_a_page_begins_where_the_last_one_ended_and_reads_nothing_before(registry, plans, ask):
    ask(registry)
    assert [step for step in plans if "name>?" in step or "(name,version)>(?,?)" in step]


def test_the_revision_is_one_row(registry, plans):
    registry.revision()
    assert plans == ["SCAN registry_clock"]


@pytest.mark.parametrize(("all_versions", "expected"), [(False, COUNT // 2), (True, COUNT)])
def test_pages_put_together_are_the_whole_list(registry, all_versions, expected):
    seen: list[str] = []
    after = None
    while page := registry.list("adapter", all_versions, base="m1@1", after=after, limit=400):
        assert len(page) <= 400
        seen += [record.id for record in page]
        after = page[-1].id if all_versions else page[-1].name
    whole = [record.id for record in registry.list("adapter", all_versions, base="m1@1")]
    assert seen == whole and len(set(seen)) == expected
