"""Error messages of vLLM and pydantic, rewritten for clients: the field and its error. Pure."""

from __future__ import annotations

import ast
import re

ENGINE_STOPPED = "The engine stopped in the middle of its answer"
VALIDATION_HEADER = re.compile(r"^\d+ validation errors?(?: for \w+)?:?\s*\n?")
VALIDATION_ITEM = re.compile(
    r"""'loc':\s*(?P<loc>\((?:'[^']*'|"[^"]*"|[^()'"])*\)),\s*'msg':\s*(?P<msg>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
)
"""Location and message of one error, in the repr of pydantic's dict."""
INTERNAL_PLACE = re.compile(r"[\[\](){}]|^[A-Z]\w*$|-")
"""Parts of a location that name pydantic's validation steps and classes of unions, not fields."""
TYPE_PLACE = re.compile(r"str|int|float|bool|bytes|list|tuple|dict|set|complex|none|nullable|union|chain|default|body")
"""Other such parts, and the whole body."""
ADVICE_TO_DEPLOYER = re.compile(
    r" ?(?:To increase this limit, s|S)et (?:the )?VLLM_\w+ (?:environment variable|to increase this limit)\.?"
)
"""Advice to the operator of the engine. Not `\\s*` at its start: that takes quadratic time in a run of blanks."""
MAX_FIELDS = 3
"""Fields that a message names."""
MAX_MESSAGE_CHARS = 4096
"""Characters of a message that are read and kept. vLLM repeats the request's values, which may be megabytes, in its messages."""


def simplify_message(message: str) -> str:
    """The message without references to the engine's log and to its operator's settings, cut to MAX_MESSAGE_CHARS."""
    message = shorten(message)
    if "See stack trace" in message:
        return f"{ENGINE_STOPPED}."
    if VALIDATION_HEADER.match(message) and (messages := _fields(message)):
        suffix = "; and more" if len(messages) > MAX_FIELDS else ""
        joined = "; ".join(f"{field}: {text}" if field else text for field, text in list(messages.items())[:MAX_FIELDS])
        return f"{joined}{suffix}."
    return ADVICE_TO_DEPLOYER.sub("", message).strip()


def shorten(message: str) -> str:
    """The first MAX_MESSAGE_CHARS characters of a message, and ` ...` if there are more."""
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]} ..."


def simplify_field(param: str | None) -> str | None:
    """The field's name in the request: pydantic's location without the leading `body`."""
    return None if param in (None, "body") else shorten(str(param)).removeprefix("body.")


def _fields(message: str) -> dict[str, str]:
    """One error of each of the first MAX_FIELDS + 1 fields. A field of a union has one for each branch: the first, or the one
    about an array's length, whose branch fits the value's type.
    """
    messages: dict[str, str] = {}
    for match in VALIDATION_ITEM.finditer(message):
        try:
            location, text = ast.literal_eval(match["loc"]), ast.literal_eval(match["msg"])
        except (ValueError, SyntaxError):
            return {}
        parts = [
            str(part) for part in location if not (INTERNAL_PLACE.search(str(part)) or TYPE_PLACE.fullmatch(str(part)))
        ]
        text = str(text).removeprefix("Value error, ").removeprefix("Assertion failed, ").strip()
        field, text = ".".join(parts), ADVICE_TO_DEPLOYER.sub("", text).rstrip(". ")
        if field not in messages or (
            text.startswith("List should have") and messages[field].startswith("Input should be")
        ):
            messages[field] = text
        if len(messages) > MAX_FIELDS:
            break
    return messages
