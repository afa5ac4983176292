"""An answer of Anthropic's API that ends with a tool call says so."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.engine.vllm.tool_use import correct_tool_use, corrected_events


def event(name: str, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


def started(kind: str) -> str:
    return event("content_block_start", index=0, content_block={"type": kind})


def ended(reason: str) -> str:
    return event("message_delta", delta={"stop_reason": reason}, usage={"output_tokens": 3})


async def passed(*events: str) -> list[str]:
    async def stream() -> AsyncIterator[str]:
        for each in events:
            yield each

    return [each async for each in corrected_events(stream())]


async def test_a_stream_with_a_tool_call_ends_with_tool_use_and_nothing_else_is_changed() -> None:
    text = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "event: message_delta\n"})
    first, second, last = await passed(started("tool_use"), text, ended("end_turn"))
    assert (first, second) == (started("tool_use"), text)
    assert json.loads(last.partition("data: ")[2]) == json.loads(ended("tool_use").partition("data: ")[2])


@pytest.mark.parametrize(
    ("block", "reason"), [("text", "end_turn"), ("tool_use", "max_tokens"), ("tool_use", "tool_use")]
)
async def test_other_streams_pass_as_they_are(block: str, reason: str) -> None:
    events = [started(block), ended(reason), "event: message_stop\ndata: {}\n\n"]
    assert await passed(*events) == events


@pytest.mark.parametrize(
    ("block", "before", "after"),
    [("tool_use", "end_turn", "tool_use"), ("text", "end_turn", "end_turn"), ("tool_use", "max_tokens", "max_tokens")],
)
def test_a_whole_answer_with_a_tool_call_ends_with_tool_use(block: str, before: str, after: str) -> None:
    answer = SimpleNamespace(stop_reason=before, content=[SimpleNamespace(type=block)])
    serving = SimpleNamespace(messages_full_converter=lambda generator: answer, message_stream_converter=None)
    correct_tool_use(serving)
    assert serving.messages_full_converter(None).stop_reason == after


def test_an_app_without_the_route_is_left() -> None:
    correct_tool_use(None)
