"""Null fields of requests are removed."""

from __future__ import annotations

from typing import Any

from tandem.api.nulls import drop_nulls


def test_null_fields_are_dropped_in_messages_too_except_their_content() -> None:
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": None}
    body: dict[str, Any] = {"user": None, "stop": [None], "messages": [message, 3]}
    drop_nulls(body)
    assert body == {"stop": [None], "messages": [{"role": "assistant", "content": None}, 3]}
    assert "refusal" in message


def test_messages_that_are_no_array_stay() -> None:
    body: dict[str, Any] = {"messages": "x", "input": None}
    drop_nulls(body)
    assert body == {"messages": "x"}
