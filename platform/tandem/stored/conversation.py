"""Conversation of stored responses: the input items of one, and the input that goes on from a chain of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tandem.stored.records import StoredAnswer


def input_items(value: Any) -> list[Any]:
    """The `input` of a request as a list of items."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return list(value) if isinstance(value, list) else []


def continued_input(chain: Iterable[StoredAnswer], value: Any) -> list[Any]:
    """The input of a request that goes on from a chain of responses, oldest first: each one's input and output, then `value`.

    `instructions` of earlier responses do not hold for later ones, as at OpenAI.
    """
    items: list[Any] = []
    for stored in chain:
        items += input_items(stored.request.get("input"))
        items += stored.answer.get("output") or []
    return items + input_items(value)


def listed_items(stored: StoredAnswer) -> list[dict[str, Any]]:
    """The input items of a stored response as its list has them: each with an id, texts as parts."""
    suffix = stored.id.removeprefix("resp_")
    items = []
    for index, item in enumerate(input_items(stored.request.get("input"))):
        if isinstance(item, Mapping):
            shown = {"id": f"msg_{suffix}_{index}", "type": "message", **item}
            if isinstance(shown.get("content"), str):
                is_answer = shown.get("role") == "assistant"
                shown["content"] = [{"type": "output_text" if is_answer else "input_text", "text": shown["content"]}]
            items.append(shown)
    return items


def listed_messages(stored: StoredAnswer) -> list[dict[str, Any]]:
    """The messages of a stored chat completion's request, each with an id."""
    messages: Sequence[Any] = stored.request.get("messages") or ()
    return [
        {"id": f"{stored.id}-{index}", **_with_text_and_parts(message)}
        for index, message in enumerate(messages)
        if isinstance(message, Mapping)
    ]


def _with_text_and_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as a list has it: `content` is text, and parts of it stand in `content_parts`."""
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content_parts": None}
    text = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return {**message, "content": text, "content_parts": content}
