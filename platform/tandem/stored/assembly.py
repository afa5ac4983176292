"""Assembly of an answer from the bytes that a client got: a JSON body, or the events of a stream. Pure.

A chat's stream is added up as OpenAI's SDK does it: texts are appended, tool calls merged by `index`. The last event of a
response's stream has the whole response.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from tandem.stored.records import AnswerKind

FINAL_EVENTS = ("response.completed", "response.incomplete", "response.failed")
REPLACED = ("id", "type", "role", "index", "finish_reason")
"""Fields of a delta that replace earlier values; other texts are appended."""


def assemble(kind: AnswerKind, body: bytes, *, is_stream: bool) -> dict[str, Any] | None:
    """The answer as one object; None for bytes that are no whole answer of this kind."""
    try:
        if not is_stream:
            answer = from_json(body)
        elif kind is AnswerKind.RESPONSE:
            answer = _final_response(body)
        else:
            answer = _added_up_chat(body)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    return answer if isinstance(answer, dict) and isinstance(answer.get("id"), str) else None


def _events(body: bytes) -> Iterator[bytes]:
    """The data of each event of a stream; each has one line of it here."""
    for line in body.replace(b"\r\n", b"\n").split(b"\n"):
        if line.startswith(b"data:"):
            yield line[5:].strip()


def _final_response(body: bytes) -> Any:
    for data in _events(body):
        # Deltas are not parsed: there are thousands.
        if any(name.encode() in data for name in FINAL_EVENTS):
            event = from_json(data)
            if event.get("type") in FINAL_EVENTS:
                return event.get("response")
    return None


def _added_up_chat(body: bytes) -> dict[str, Any] | None:
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    is_whole = False
    for data in _events(body):
        if data == b"[DONE]":
            is_whole = True
            break
        chunk = from_json(data)
        if "error" in chunk:
            return None
        answer |= {key: value for key, value in chunk.items() if key != "choices" and value is not None}
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "message": {}})
            _merge(choice["message"], part.get("delta") or {})
            _merge(choice, {key: value for key, value in part.items() if key != "delta"})
    if not is_whole or not choices:
        return None
    for choice in choices.values():
        choice["message"] = {"role": "assistant", "content": None} | choice["message"]
        for call in choice["message"].get("tool_calls") or ():
            call.pop("index", None)
    return answer | {"object": "chat.completion", "choices": [choices[index] for index in sorted(choices)]}


def _merge(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part to what came before it."""
    for key, value in part.items():
        before = whole.get(key)
        if value is None or before is None:
            if isinstance(value, list) and any(isinstance(each, dict) and "index" in each for each in value):
                whole[key] = []
                _merge_list(whole[key], value)
            else:
                whole[key] = before if value is None else value
        elif isinstance(value, dict) and isinstance(before, dict):
            _merge(before, value)
        elif isinstance(value, list) and isinstance(before, list):
            _merge_list(before, value)
        elif isinstance(value, str) and isinstance(before, str) and key not in REPLACED:
            whole[key] = before + value
        else:
            whole[key] = value


def _merge_list(whole: list[Any], parts: list[Any]) -> None:
    """Merge parts with an `index` into the entry of that index, and append all others."""
    for part in parts:
        index = part.get("index") if isinstance(part, dict) else None
        same = next((each for each in whole if isinstance(each, dict) and each.get("index") == index), None)
        if index is None or same is None:
            whole.append(part)
        else:
            _merge(same, part)
