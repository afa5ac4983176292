"""Bodies with more values than a request needs are refused before they are parsed; text of any kind is not."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.bounded_json import (
    BUDGET,
    CONTAINER_COST,
    MAX_DIGITS,
    SMALL_BYTES,
    TEXT_COST,
    InvalidJsonError,
    TooManyValuesError,
    check_size,
    cost,
    parse_object,
)

MIB = 2**20
MAX_CONTAINERS, MAX_ITEMS, MAX_TEXTS = BUDGET // CONTAINER_COST, BUDGET, BUDGET // TEXT_COST
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":[' + b"{}," * MAX_CONTAINERS + b"{}]}",
        b'{"a":' + b"[" * MIB,
        b'{"a":[' + b"1," * (MAX_ITEMS + 1) + b"1]}",
        b"{" + b",".join(b'"%d":1' % n for n in range(MAX_TEXTS + 1)) + b"}",
        b'{"a":[' + b'"",' * (MAX_TEXTS + 1) + b"1]}",
        # The brackets stand behind a text that has escaped quotation marks and ends in a backslash.
        b'{"a":"\\"{\\\\","b":' + b"[" * (MAX_CONTAINERS + 1),
        # Each alone is within the budget.
        b'{"a":[' + b"1," * (MAX_ITEMS // 2) + b'1],"b":[' + b'"",' * (MAX_TEXTS // 2) + b"1]}",
    ],
)
def test_too_many_values_are_refused(body: bytes) -> None:
    with pytest.raises(TooManyValuesError, match="at most|times what is taken"):
        parse_object(body)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": list(range(131_072))},
        {"prompt": "{[,]}" * 300_000},
        {"prompt": 'x = {"a": [1, 2]}\n' * 50_000},
        {"prompt": "\\" * MIB},
        {"input": ["a text"] * 2048},
        {"messages": [{"role": "user", "content": f"{n} {{[,]}}"} for n in range(4000)]},
    ],
)
def test_large_requests_are_taken(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


def test_a_number_without_end_is_refused_and_as_a_text_it_is_taken() -> None:
    with pytest.raises(InvalidJsonError, match="20 or more digits"):
        parse_object(b'{"seed": ' + b"9" * 5000 + b"}")
    assert parse_object(b'{"user": "' + b"9" * 5000 + b'", "seed": 18446744073709}')["seed"] == 18446744073709


@pytest.mark.parametrize("body", [b"", b"{", b'"secret', b"[1]", b"1", b"nul", b"\xff", b'{"a": NaN}', b"[" * 500])
def test_what_is_no_object_is_refused_without_its_content(body: bytes) -> None:
    with pytest.raises(InvalidJsonError) as refused:
        parse_object(body)
    assert "secret" not in str(refused.value) and len(str(refused.value)) < 300


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_every_small_object_is_read_as_it_is(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value
    # Where its values have to be told from its texts, too.
    padded = json.dumps({**value, "text": "{" * (MAX_CONTAINERS + 1)}).encode()
    assert parse_object(padded)["text"].startswith("{")


@pytest.mark.parametrize("repeated", [b"{}", b"{},", b"[", b'""', b'"",', b'"":[],', b",", b"1,"])
def test_no_small_body_costs_more_than_the_budget_so_their_values_are_not_counted(
    repeated: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = (repeated * SMALL_BYTES)[:SMALL_BYTES]
    assert cost(body, body.count(b'"') / 2) <= BUDGET
    counted: list[int] = []
    monkeypatch.setattr("tandem.api.bounded_json.cost", lambda text, texts: counted.append(len(text)) or 0.0)
    check_size(body)
    assert not counted
    check_size(body + b" ")
    assert counted


@given(st.text("0123456789,. x", max_size=80), st.integers(0, 30), st.integers(15, 25))
def test_numbers_of_twenty_digits_are_found_at_any_place(text: str, before: int, digits: int) -> None:
    body = b"x" * before + text.encode() + b"7" * digits + b" "
    long = re.search(rb"[0-9]{%d}" % MAX_DIGITS, body) is not None
    if long:
        with pytest.raises(InvalidJsonError, match="20 or more digits"):
            check_size(body)
    else:
        check_size(body)
