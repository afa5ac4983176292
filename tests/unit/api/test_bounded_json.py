"""Bodies with more values than a request needs are refused before they are parsed; text of any kind is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.bounded_json import (
    MAX_CONTAINERS,
    MAX_ITEMS,
    MAX_TEXTS,
    InvalidJsonError,
    TooManyValuesError,
    parse_object,
)

MIB = 2**20
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
    ],
)
def test_too_many_values_are_refused(body: bytes) -> None:
    with pytest.raises(TooManyValuesError, match="at most"):
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
