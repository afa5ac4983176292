"""Checks the shape of a conversation's messages, in OpenAI's APIs and in Anthropic's. Pure.

vLLM's own error for a wrong message names its pydantic classes, one line for each that the message might have been.
"""

from __future__ import annotations

from typing import Any, Literal

from tandem.api.values import Problem, format_value, kind

Dialect = Literal["chat", "responses", "anthropic"]
"""The form of messages: vLLM's for chat completions, with its extensions, or one of two others."""
ANTHROPIC = ("/v1/messages", "/v1/messages/count_tokens")
ANTHROPIC_ROLES = ("user", "assistant", "system")
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
"""Types of parts whose text is under a key of the same name, or under `text`."""
NULL_TEXT_PARTS = ("text", "refusal")
"""Types of parts that vLLM skips in chats if their text is null."""
UNTYPED_PARTS = frozenset[str](
    (
        *NULL_TEXT_PARTS,
        *("image_url", "image_pil", "image_embeds", "audio_url", "audio_embeds", "input_audio"),
        *("video_url", "video_embeds", "prompt_embeds", "tool_reference"),
    )
)
"""Keys from which vLLM infers the type of a part of a chat without `type`."""
EMPTY_ROLES = ("assistant", "function")
"""Roles of chats whose content may be null: a message may be its calls alone."""
TEXT_FIELDS = ("name", "tool_call_id", "refusal", "reasoning", "reasoning_content")


def message_problem(path: str, messages: Any) -> Problem | None:
    """The first problem in `messages` of a request to the route `path`; None: there is none."""
    if not isinstance(messages, list):
        return Problem("messages", f"is {kind(messages)}; it must be an array of messages")
    if not messages:
        return Problem("messages", "is empty; it must have at least one message")
    dialect: Dialect = "anthropic" if path in ANTHROPIC else "chat"
    for index, message in enumerate(messages):
        problem = _message(f"messages.{index}", message, dialect)
        if problem is not None:
            return problem
    return None


def input_problem(value: Any) -> Problem | None:
    """The first problem in `input` of `/v1/responses`: text, or items, of which those with `content` are messages."""
    if isinstance(value, str):
        return None
    if not isinstance(value, list):
        return Problem("input", f"is {kind(value)}; it must be text or an array of items")
    for index, item in enumerate(value):
        param = f"input.{index}"
        if not isinstance(item, dict):
            return Problem(param, f"is {kind(item)}; it must be an object, such as {{'role': 'user', 'content': ...}}")
        if "content" in item and item.get("type", "message") == "message":
            if item["content"] is None:
                return Problem(f"{param}.content", "is null; it must be text or an array of parts")
            if problem := _content(f"{param}.content", {"role": "user", **item}, "responses"):
                return problem
    return None


def _message(param: str, message: Any, dialect: Dialect) -> Problem | None:
    if not isinstance(message, dict):
        return Problem(param, f"is {kind(message)}; it must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str):
        error = "is missing" if role is None else f"is {kind(role)}"
        return Problem(f"{param}.role", f"{error}; it must be text, such as 'user' or 'assistant'")
    if dialect == "anthropic" and role not in ANTHROPIC_ROLES:
        return Problem(f"{param}.role", f"is {format_value(role)}; it must be one of {', '.join(ANTHROPIC_ROLES)}")
    for field in TEXT_FIELDS:
        if message.get(field) is not None and not isinstance(message[field], str):
            return Problem(f"{param}.{field}", f"is {kind(message[field])}; it must be text")
    return _content(f"{param}.content", message, dialect) or _tool_calls(f"{param}.tool_calls", message)


def _content(param: str, message: dict[str, Any], dialect: Dialect) -> Problem | None:
    content = message.get("content")
    if content is None:
        # vLLM accepts messages of chats without content, but null only in those of EMPTY_ROLES.
        if dialect == "anthropic" or ("content" in message and message["role"] not in EMPTY_ROLES):
            error = "is null" if "content" in message else "is missing"
            return Problem(param, f"{error}; it must be text or an array of parts")
        return None
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return Problem(param, f"is {kind(content)}; it must be text or an array of parts")
    for index, part in enumerate(content):
        problem = _part(f"{param}.{index}", part, dialect)
        if problem is not None:
            return problem
    return None


def _part(param: str, part: Any, dialect: Dialect) -> Problem | None:
    if isinstance(part, str) and dialect != "anthropic":
        return None
    if not isinstance(part, dict):
        return Problem(
            param, f"is {kind(part)}; it must be an object with a type, such as {{'type': 'text', 'text': ...}}"
        )
    part_type = part.get("type")
    if part_type is None and dialect == "chat" and not UNTYPED_PARTS.isdisjoint(part):
        return None
    if not isinstance(part_type, str):
        error = "is missing" if part_type is None else f"is {kind(part_type)}"
        return Problem(f"{param}.type", f"{error}; it must be text, such as 'text'")
    if part_type in TEXT_PARTS:
        key = part_type if part_type in part else "text"
        text = part.get(key)
        if text is None and key in part and dialect == "chat" and part_type in NULL_TEXT_PARTS:
            return None
        if not isinstance(text, str):
            return Problem(f"{param}.{key}", f"is {'missing' if text is None else kind(text)}; it must be text")
    return None


def _tool_calls(param: str, message: dict[str, Any]) -> Problem | None:
    calls = message.get("tool_calls")
    if calls is None:
        return None
    if not isinstance(calls, list):
        return Problem(param, f"is {kind(calls)}; it must be an array of calls")
    for index, call in enumerate(calls):
        call_param = f"{param}.{index}"
        if not isinstance(call, dict):
            return Problem(call_param, f"is {kind(call)}; it must be an object with id, type and function")
        if call.get("type", "function") != "function":
            continue
        function = call.get("function")
        if not isinstance(function, dict):
            error = "is missing" if function is None else f"is {kind(function)}"
            return Problem(f"{call_param}.function", f"{error}; it must be an object with name and arguments")
        if not isinstance(function.get("name"), str):
            return Problem(f"{call_param}.function.name", f"is {kind(function.get('name'))}; it must be text")
        arguments = function.get("arguments", "")
        if not isinstance(arguments, str):
            return Problem(f"{call_param}.function.arguments", f"is {kind(arguments)}; it must be JSON as text")
    return None
