"""What a row asks for, or why it asks for nothing."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tandem.batch.input.rows import BadRowError, parse, read_row, request_bytes


@pytest.mark.parametrize(
    ("row", "path", "body"),
    [
        ({"prompt": "a"}, "/v1/completions", {"prompt": "a"}),
        ({"text": "a"}, "/v1/completions", {"prompt": "a"}),
        ({"prompt": "a", "max_tokens": 3}, "/v1/completions", {"prompt": "a", "max_tokens": 3}),
        ({"messages": [{"role": "user"}]}, "/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ({"input": ["a", "b"]}, "/v1/embeddings", {"input": ["a", "b"]}),
        ({"url": "/v1/score", "body": {"text_1": "a", "text_2": "b"}}, "/v1/score", {"text_1": "a", "text_2": "b"}),
    ],
)
def test_a_row_is_a_request(row: dict[str, Any], path: str, body: dict[str, Any]) -> None:
    ask = read_row({**row, "custom_id": "q1"}, {})
    assert (ask.path, ask.body, ask.model, ask.custom_id) == (path, body, None, "q1")
    assert ask.plain == ("body" not in row)


def test_what_a_row_says_wins_over_the_runs_defaults() -> None:
    ask = read_row({"prompt": "a", "temperature": 1, "model": "red"}, {"temperature": 0, "max_tokens": 7})
    assert ask.model == "red"
    assert json.loads(request_bytes(ask, "red@2")) == {
        "prompt": "a", "temperature": 1, "max_tokens": 7, "model": "red@2",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "It has nothing; a row has prompt, messages or input"),
        ({"question": "a"}, "It has question; a row has"),
        ({"prompt": "a", "messages": []}, "It has messages and prompt"),
        ({"url": "/v1/completions", "body": "x"}, "body is a str"),
        ({"url": "/v1/completions"}, "body is missing"),
        (
            {"url": "/v1/completion", "body": {}},
            "'/v1/completion', which no engine answers. Did you mean '/v1/completions'",
        ),
        ({"url": "/metrics", "body": {}}, "which no engine answers"),
        ({"method": "GET", "url": "/v1/completions", "body": {}}, "method is 'GET'"),
        ({"prompt": "a", "stream": True}, "stream is on"),
        ({"prompt": "a", "model": 3}, "model is 3"),
        ({"prompt": "a", "custom_id": [3]}, "custom_id is [3]"),
        ({"prompt": "a", "temperature": "hot"}, "`temperature` is 'hot'; it must be a number from 0 to 2."),
        ({"messages": [{"role": "user", "content": 3}]}, "`messages.0.content` is a number; it must be text"),
    ],
)
def test_a_bad_row_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=re.escape(reason)):
        read_row(row, {})


def test_null_fields_of_a_row_are_treated_as_absent() -> None:
    said = {"role": "assistant", "content": None, "refusal": None}
    ask = read_row({"messages": [said], "temperature": None, "user": None}, {"temperature": 0, "seed": None})
    assert ask.body == {"temperature": 0, "messages": [{"role": "assistant", "content": None}]}
    row = {"url": "/v1/embeddings", "body": {"input": "a", "encoding_format": None}}
    assert read_row(row, {}).body == {"input": "a"}
    assert read_row(row, {}, check_values=False).body == {"input": "a", "encoding_format": None}


@pytest.mark.parametrize(
    ("raw", "reason"), [(b"{bad", "not valid JSON"), (b"[1]", "a list"), (b"\xff", "not valid JSON")]
)
def test_what_is_no_object_is_a_bad_row(raw: bytes, reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        parse(raw)


def test_a_number_may_name_a_row() -> None:
    assert read_row({"prompt": "a", "custom_id": 3}, {}).custom_id == "3"


def test_where_a_cache_lies_is_not_a_rows_to_say() -> None:
    assert read_row({"prompt": "a", "kv_transfer_params": {"host": "x"}}, {}).body == {"prompt": "a"}


def test_with_chat_a_plain_prompt_is_a_users_message_and_other_rows_are_as_before() -> None:
    ask = read_row({"prompt": "a", "max_tokens": 3}, {}, chat=True)
    assert (ask.path, ask.plain) == ("/v1/chat/completions", True)
    assert ask.body == {"max_tokens": 3, "messages": [{"role": "user", "content": "a"}]}
    assert read_row({"text": "a"}, {}, chat=True).body == {"messages": [{"role": "user", "content": "a"}]}
    for row in ({"input": "a"}, {"url": "/v1/completions", "body": {"prompt": "a"}}):
        assert read_row(row, {}, chat=True) == read_row(row, {})
    with pytest.raises(BadRowError, match="prompt is a list; as a message .* it must be text"):
        read_row({"prompt": [1, 2]}, {}, chat=True)


def test_only_a_plain_prompt_goes_round_the_chat_template() -> None:
    assert read_row({"prompt": "a"}, {}).is_bare_prompt
    assert not read_row({"prompt": "a"}, {}, chat=True).is_bare_prompt
    assert not read_row({"url": "/v1/completions", "body": {"prompt": "a"}}, {}).is_bare_prompt
