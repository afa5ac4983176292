"""Routing and scheduling hints of requests."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from tandem.config import ServedModelConfig
from tandem.config.serving.app import MAX_TIMEOUT_S
from tandem.engine.protocol import AdapterRef
from tandem.gateway.errors import ApiError
from tandem.gateway.models.catalog import ResolvedModel
from tandem.gateway.requests.request_hints import MAX_TEXT_PARTS, read_routing_request, take_scheduling_hints
from tandem.routing.records import ServedModel
from tandem.routing.request import MAX_HASHED_BYTES, PREFIX_LENGTHS, RoutingRequest, hash_prefixes

BASE = ServedModel(id="base@1", name="base", path="", config=ServedModelConfig(model="base", engine="vllm"))
LONG = "the quick brown fox " * 200
"""4,000 bytes: six beginnings."""


def read(body: dict[str, Any], adapter: str | None = None, **headers: str) -> RoutingRequest:
    ref = AdapterRef(id=adapter, path="/x") if adapter else None
    return read_routing_request(
        ResolvedModel(base=BASE, adapter=ref), body, {key.replace("_", "-"): text for key, text in headers.items()}
    )


def chat(*texts: Any, **more: Any) -> dict[str, Any]:
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": roles[i % 3], "content": text} for i, text in enumerate(texts)], **more}


def shared(one: RoutingRequest, other: RoutingRequest) -> int:
    """Beginnings that two requests have in common; after the first difference there is none."""
    same = [a == b for a, b in zip(one.prefix_hashes, other.prefix_hashes, strict=False)]
    count = sum(same)
    assert same == [True] * count + [False] * (len(same) - count)
    return count


# Bodies that begin with LONG, in each API's words.
BODIES: list[dict[str, Any]] = [
    {"prompt": LONG},
    {"prompt": [LONG, "another"]},
    chat(LONG),
    chat([{"type": "text", "text": LONG}]),
    {"instructions": LONG, "input": "x"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": LONG}]}]},
    {"system": LONG, "messages": []},
    {"system": [{"type": "text", "text": LONG}], "messages": []},
    {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}], **chat("x")},
    {"prompt": list(range(1000))},
    {"prompt": [list(range(1000))]},
]


def extended(body: dict[str, Any]) -> dict[str, Any]:
    """The same with more at its end."""
    text = json.dumps(body)
    if LONG in text:
        return json.loads(text.replace(LONG, LONG + LONG))  # type: ignore[no-any-return]
    return json.loads(text.replace("999]", "999" + ", 5" * 1000 + "]"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: "-".join(body))
def test_an_extended_text_shares_the_prefix_hashes_of_the_shorter_in_every_api(body: dict[str, Any]) -> None:
    short, long = read(body), read(extended(body))
    assert len(short.prefix_hashes) == 6 and len(long.prefix_hashes) >= 8
    assert shared(short, long) >= 5
    assert shared(read(body), read({**body, "temperature": 0.5, "stream": True})) == 6


@pytest.mark.parametrize("body", BODIES, ids=lambda body: "-".join(body))
def test_prefix_hashes_differ_between_adapters_and_the_base(body: dict[str, Any]) -> None:
    asks = [read(body), read(body, "red@1"), read(body, "red@2")]
    assert [a.adapter for a in asks] == [None, "red@1", "red@2"] and all(a.pool == "base@1" for a in asks)
    assert shared(asks[0], asks[1]) == shared(asks[1], asks[2]) == 0


def test_the_next_turn_of_a_conversation_shares_the_prefix_hashes_of_the_last() -> None:
    first, second = read(chat(LONG, "one question")), read(chat(LONG, "one question", "an answer", LONG))
    assert shared(first, second) == len(first.prefix_hashes) == 6
    assert shared(first, read(chat("Other. " + LONG, "one question"))) == 0


def test_prefix_hashes_depend_on_the_role_of_a_message() -> None:
    body = chat("x", LONG)
    other = {"messages": [body["messages"][0], {"role": "assistant", "content": LONG}]}
    assert shared(read(body), read(other)) == 0


def test_a_bounded_part_of_a_text_is_hashed() -> None:
    ask = read({"prompt": "x" * 10_000_000})
    assert (len(ask.prefix_hashes), ask.size) == (len(PREFIX_LENGTHS), MAX_HASHED_BYTES)
    assert shared(ask, read({"prompt": "x" * MAX_HASHED_BYTES + "y" * 10_000_000})) == len(PREFIX_LENGTHS)
    many = read(chat(*["hello there"] * 100_000))
    assert many.size < MAX_TEXT_PARTS * 30


def test_a_short_text_has_no_prefix_hashes() -> None:
    assert read({"prompt": "hello"}).prefix_hashes == ()
    assert read({"prompt": "hello"}).size == 5


@given(st.lists(st.binary(max_size=700), max_size=80), st.integers(0, 30))
def test_prefix_hashes_do_not_depend_on_the_parts_of_a_text(pieces: list[bytes], at: int) -> None:
    complete = b"".join(pieces)
    assert (
        hash_prefixes("s", pieces)
        == hash_prefixes("s", [complete])
        == hash_prefixes("s", [complete[:at], complete[at:]])
    )
    found, size = hash_prefixes("s", pieces)
    assert size == min(len(complete), MAX_HASHED_BYTES) and len(found) == sum(bound <= size for bound in PREFIX_LENGTHS)
    assert hash_prefixes("s", [complete + b"more"])[0][: len(found)] == found


@pytest.mark.parametrize(
    ("body", "headers", "same"),
    [
        ({"user": "ann"}, {}, True),
        ({"prompt_cache_key": "ann"}, {}, True),
        ({"safety_identifier": "ann"}, {}, True),
        ({"metadata": {"user_id": "ann"}}, {}, True),
        ({}, {"x_session_id": "ann"}, True),
        ({"user": "bob", "prompt_cache_key": "ann"}, {}, True),
        ({"user": "bob"}, {"x_session_id": "ann"}, True),
        ({"user": "bob"}, {}, False),
        ({}, {}, False),
        ({"user": ""}, {}, False),
        ({"user": 7, "metadata": "ann"}, {}, False),
    ],
)
def test_a_session_is_named_by_a_header_or_by_the_fields_of_an_api(
    body: dict[str, Any], headers: dict[str, str], same: bool
) -> None:
    ann = read({"user": "ann"}).session
    assert ann is not None
    assert (read(body, **headers).session == ann) is same


NONSENSE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = ("prompt", "messages", "input", "system", "tools", "user", "metadata", "instructions")


@given(st.dictionaries(st.sampled_from(FIELDS), NONSENSE))
def test_any_json_body_gives_a_routing_request(body: dict[str, Any]) -> None:
    read(body)


@pytest.mark.parametrize(
    "body",
    ['{"prompt": "\\ud800"}', '{"user": "\\ud800"}', '{"prompt": [1, "x"]}', '{"prompt": [-1]}', '{"prompt": [[]]}'],
)
def test_invalid_text_and_token_ids_are_left_to_the_engine(body: str) -> None:
    read(json.loads(body))


def test_a_deeply_nested_body_is_not_followed_forever() -> None:
    read(from_json('{"messages": ' + '[{"content": ' * 90 + '"x"' + "}]" * 90 + "}"))


@pytest.mark.parametrize("header", ["x-stainless-timeout", "x-stainless-read-timeout"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_time_out_of_an_sdk_counts_up_to_the_longest_of_a_request(header: str, stream: bool) -> None:
    hints = take_scheduling_hints({"stream": stream}, {header: "1e12"}, 0.0)
    assert hints.left_s(0.0) == MAX_TIMEOUT_S
    assert take_scheduling_hints({"stream": stream}, {header: "30"}, 0.0).left_s(0.0) == 30.0


@pytest.mark.parametrize("field", ["priority", "timeout"])
@pytest.mark.parametrize("value", ["x" * 2**20, ["x" * 2**20], {"x" * 2**20: 1}])
def test_a_priority_or_time_out_of_a_wrong_type_is_not_written_out(field: str, value: Any) -> None:
    tracemalloc.start()
    with pytest.raises(ApiError) as error:
        take_scheduling_hints({field: value}, {}, 0.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.value.param == field and "characters)" not in error.value.message
    assert len(error.value.message) < 200 and peak_bytes < 2**19
