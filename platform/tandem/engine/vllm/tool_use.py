"""Corrects `stop_reason` in vLLM's answers to Anthropic's `/v1/messages`.

Where `tool_choice` names a tool, OpenAI's `finish_reason` is "stop", and vLLM makes "end_turn" of it. In Anthropic's API an
answer that ends with a tool call has "tool_use", and clients run the tool only then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic_core import from_json, to_json

TOOL_USE, END_TURN = "tool_use", "end_turn"


def correct_tool_use(serving: Any) -> None:
    """Wrap the two methods of vLLM's AnthropicServingMessages that make answers. None, of models that write nothing, is left."""
    if serving is None:
        return
    whole: Callable[[Any], Any] = serving.messages_full_converter
    stream: Callable[[Any], AsyncIterator[str]] = serving.message_stream_converter

    def corrected(generator: Any) -> Any:
        answer = whole(generator)
        if answer.stop_reason == END_TURN and any(block.type == TOOL_USE for block in answer.content):
            answer.stop_reason = TOOL_USE
        return answer

    serving.messages_full_converter = corrected
    serving.message_stream_converter = lambda generator: corrected_events(stream(generator))


async def corrected_events(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events of a stream, each a line `event: NAME` and a line `data: JSON`, with the last one's `stop_reason` corrected."""
    used = False
    async for event in events:
        # Names of events are vLLM's; text of the model is inside JSON and cannot begin a line.
        if event.startswith("event: content_block_start\n"):
            used = used or _data(event).get("content_block", {}).get("type") == TOOL_USE
        elif used and event.startswith("event: message_delta\n"):
            data = _data(event)
            if data.get("delta", {}).get("stop_reason") == END_TURN:
                data["delta"]["stop_reason"] = TOOL_USE
                event = f"event: message_delta\ndata: {to_json(data).decode()}\n\n"
        yield event


def _data(event: str) -> dict[str, Any]:
    value = from_json(event.partition("data: ")[2])
    return value if isinstance(value, dict) else {}
