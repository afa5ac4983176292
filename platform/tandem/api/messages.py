"""Checks the shape of a conversation's messages, in OpenAI's APIs and in Anthropic's. Pure.

vLLM tells of a wrong message by its classes, one line for each that it might have been.
"""

from __future__ import annotations

from typing import Any, Literal

from tandem.api.values import Problem, kind, shown

Dialect = Literal["chat", "responses", "anthropic"]
"""The form of messages: vLLM's for chat completions, with its extensions, or one of two others."""
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
ANTHROPIC_ROLES = ("user", "assistant", "system")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
"""Types of parts whose text is under a key of the same name, or under `text`."""
NULL_TEXT_PARTS = ("text", "refusal")
"""Those that vLLM skips in chats if their text is null."""
UNTYPED_PARTS = frozenset[str](
    (
        *NULL_TEXT_PARTS,
        *("image_url", "image_pil", "image_embeds", "audio_url", "audio_embeds", "input_audio"),
        *("video_url", "video_embeds", "prompt_embeds", "tool_reference"),
    )
)
"""Keys by which vLLM tells what a part of a chat without `type` is."""
EMPTY_ROLES = ("assistant", "function")
"""Roles of chats whose content may be null: a message may be its calls alone."""
TEXT_FIELDS = ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content")


def message_problem(path: str, messages: Any) -> Problem | None:
    """The first thing in `messages` of a request to the route `path` that is not as it must be; None: nothing was found."""
    if not isinstance(messages, list):
        return Problem("messages", f"is {kind(messages)}; it must be an array of messages")
    if not messages:
        return Problem("messages", "is empty; it must have at least one message")
    dialect: Dialect = "anthropic" if path in ANTHROPIC else "chat"
    for place, message in enumerate(messages):
        problem = _message(f"messages.{place}", message, dialect)
        if problem is not None:
            return problem
    return None


def input_problem(value: Any) -> Problem | None:
    """The same for `input` of `/v1/responses`: text, or items, of which those with `content` are messages."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return Problem("input", f"is {kind(value)}; it must be text or an array of items")
    for place, item in enumerate(value):
        where = f"input.{place}"
        if not isinstance(item, dict):
            return Problem(where, f"is {kind(item)}; it must be an object, such as {{'role': 'user', 'content': ...}}")
        if "content" in item and item.get("type", "message") == "message":
            if item["content"] is None:
                return Problem(f"{where}.content", "is null; it must be text or an array of parts")
            if problem := _content(f"{where}.content", {"role": "user", **item}, "responses"):
                return problem
    return None


def _message(where: str, message: Any, dialect: Dialect) -> Problem | None:
    if not isinstance(message, dict):
        return Problem(where, f"is {kind(message)}; it must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str):
        found = "is missing" if role is None else f"is {kind(role)}"
        return Problem(f"{where}.role", f"{found}; it must be text, such as 'user' or 'assistant'")
    if dialect == "anthropic" and role not in ANTHROPIC_ROLES:
        return Problem(f"{where}.role", f"is {shown(role)}; it must be one of {', '.join(ANTHROPIC_ROLES)}")
    for field in TEXT_FIELDS:
        if message.get(field) is not None and not isinstance(message[field], str):
            return Problem(f"{where}.{field}", f"is {kind(message[field])}; it must be text")
    return _content(f"{where}.content", message, dialect) or _tool_calls(f"{where}.tool_calls", message)


def _content(where: str, message: dict[str, Any], dialect: Dialect) -> Problem | None:
    content = message.get("content")
    if content is None:
        # vLLM accepts messages of chats without content, but null only in those of EMPTY_ROLES.
        if dialect == "anthropic" or ("content" in message and message["role"] not in EMPTY_ROLES):
            found = "is null" if "content" in message else "is missing"
            return Problem(where, f"{found}; it must be text or an array of parts")
        return None
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return Problem(where, f"is {kind(content)}; it must be text or an array of parts")
    for place, part in enumerate(content):
        problem = _part(f"{where}.{place}", part, dialect)
        if problem is not None:
            return problem
    return None


def _part(where: str, part: Any, dialect: Dialect) -> Problem | None:
    if isinstance(part, str) and dialect != "anthropic":
        return None
    if not isinstance(part, dict):
        return Problem(
            where, f"is {kind(part)}; it must be an object with a type, such as {{'type': 'text', 'text': ...}}"
        )
    sort = part.get("type")
    if sort is None and dialect == "chat" and not UNTYPED_PARTS.isdisjoint(part):
        return None
    if not isinstance(sort, str):
        found = "is missing" if sort is None else f"is {kind(sort)}"
        return Problem(f"{where}.type", f"{found}; it must be text, such as 'text'")
    if sort in TEXT_PARTS:
        key = sort if sort in part else "text"
        text = part.get(key)
        if text is None and key in part and dialect == "chat" and sort in NULL_TEXT_PARTS:
            return None
        if not isinstance(text, str):
            return Problem(f"{where}.{key}", f"is {'missing' if text is None else kind(text)}; it must be text")
    return None


def _tool_calls(where: str, message: dict[str, Any]) -> Problem | None:
    calls = message.get("tool_calls")
    if calls is None:
        return None
    if not isinstance(calls, list):
        return Problem(where, f"is {kind(calls)}; it must be an array of calls")
    for place, call in enumerate(calls):
        here = f"{where}.{place}"
        if not isinstance(call, dict):
            return Problem(here, f"is {kind(call)}; it must be an object with id, type and function")
        if call.get("type", "function") != "function":
            continue
        function = call.get("function")
        if not isinstance(function, dict):
            found = "is missing" if function is None else f"is {kind(function)}"
            return Problem(f"{here}.function", f"{found}; it must be an object with name and arguments")
        if not isinstance(function.get("name"), str):
            return Problem(f"{here}.function.name", f"is {kind(function.get('name'))}; it must be text")
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            return Problem(f"{here}.function.arguments", f"is {kind(arguments)}; it must be JSON as text")
    return None
