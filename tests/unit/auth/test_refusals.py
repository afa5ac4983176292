"""Refused credentials in memory: equal ones are one row with a count, and a flood neither grows memory nor the database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tandem.auth.refusals import ACTION, BURST, MAX_KINDS, OTHERS, Refusal, Refusals

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def refusal(address: str = "10.0.0.1", by: str = "") -> Refusal:
    return Refusal(status=403 if by else 401, code="c", address=address, by=by, target="GET /v1/models")


def counts(rows: list) -> int:
    return sum(row.after["count"] for row in rows)


def test_equal_refusals_are_one_row_with_their_number_and_times() -> None:
    refusals = Refusals()
    for second in range(3):
        # The first was sent without a key.
        refusals.add(refusal(), NOW + timedelta(seconds=second), hint="tdm-abcd" if second else None)
    refusals.add(refusal("10.0.0.2"), NOW)
    first, second = refusals.take(NOW + timedelta(seconds=5))
    assert (first.action, first.target, first.address, first.at) == (ACTION, "GET /v1/models", "10.0.0.1", NOW)
    assert first.after == {
        "count": 3, "last_at": (NOW + timedelta(seconds=2)).isoformat(), "status": 401, "code": "c", "hint": "tdm-abcd",
    }  # fmt: skip
    assert second.address == "10.0.0.2" and counts([second]) == 1
    assert refusals.take(NOW + timedelta(seconds=10)) == []


def test_a_flood_from_many_addresses_is_bounded_in_memory_and_counted_whole() -> None:
    refusals = Refusals()
    for number in range(50_000):
        refusals.add(refusal(str(number)), NOW)
    assert len(refusals._counts) == MAX_KINDS
    rows = refusals.take(NOW)
    assert len(rows) == BURST + 1 and rows[-1].target == OTHERS
    assert counts(rows) == 50_000


def test_a_flood_of_an_hour_writes_few_rows_and_loses_no_count() -> None:
    refusals, rows, number = Refusals(), [], 0
    for step in range(720):
        now = NOW + timedelta(seconds=5 * step)
        for each in range(30):
            refusals.add(refusal(f"{step}-{each}"), now)
            number += 1
        rows += refusals.take(now)
    rows += refusals.take(NOW + timedelta(hours=1), final=True)
    # The burst, one row every 10 s, and one a minute with the rest.
    assert len(rows) <= BURST + 360 + 61
    assert counts(rows) == number


def test_refusals_of_known_keys_have_rows_before_those_of_nobody() -> None:
    refusals = Refusals()
    refusals._row_budget = 1.0
    refusals.add(refusal("10.0.0.1"), NOW)
    refusals.add(refusal("10.0.0.1"), NOW)
    refusals.add(refusal("10.0.0.1", by="key_1"), NOW)
    named, others = refusals.take(NOW)
    assert named.by == "key_1" and (others.target, counts([others])) == (OTHERS, 2)
