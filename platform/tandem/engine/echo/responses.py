"""Shapes of `/v1/responses` for the echo engine: the prompt of an input, the response object, the events of a stream. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def prompt_of(body: Mapping[str, Any]) -> str:
    """All texts of a request: its instructions, and those of its input items, the model's own among them."""
    texts = [str(body.get("instructions") or "")]
    value = body.get("input")
    for item in [{"content": value}] if isinstance(value, str) else value or ():
        content = item.get("content", item.get("output")) if isinstance(item, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        texts += [str(part.get("text") or "") for part in parts if isinstance(part, dict)]
    return " ".join(filter(None, texts))


def response(head: Mapping[str, Any], body: Mapping[str, Any], text: str, usage: Mapping[str, int]) -> dict[str, Any]:
    """The response object with an answer's text."""
    item_id = f"msg_{str(head['id']).removeprefix('resp_')}"
    part: dict[str, Any] = {"type": "output_text", "text": text, "annotations": [], "logprobs": None}
    return {
        **head,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "metadata": body.get("metadata"),
        "previous_response_id": None,
        "output": [{"id": item_id, "type": "message", "role": "assistant", "status": "completed", "content": [part]}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


def first_events(whole: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events before the first token of a response."""
    item = {**whole["output"][0], "status": "in_progress", "content": []}
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    yield {"type": "response.created", "response": begun, "sequence_number": 0}
    yield {"type": "response.output_item.added", "output_index": 0, "item": item, "sequence_number": 1}


def delta_event(whole: Mapping[str, Any], token: str, number: int) -> dict[str, Any]:
    """The event of one token."""
    return {
        "type": "response.output_text.delta",
        "item_id": whole["output"][0]["id"],
        "output_index": 0,
        "content_index": 0,
        "delta": token,
        "logprobs": [],
        "sequence_number": number,
    }


def last_event(whole: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The event with the whole response."""
    return {"type": "response.completed", "response": dict(whole), "sequence_number": number}
