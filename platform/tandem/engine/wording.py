"""Error messages of vLLM and pydantic, in words for whoever sent the request: the field, and what is wrong with it. Pure."""

from __future__ import annotations

import ast
import re

STOPPED = "The engine stopped in the middle of its answer"
VALIDATION = re.compile(r"^\d+ validation errors?(?: for \w+)?:?\s*\n?")
ITEM = re.compile(
    r"""'loc':\s*(?P<loc>\((?:'[^']*'|"[^"]*"|[^()'"])*\)),\s*'msg':\s*(?P<msg>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
)
"""The place and the message of an error, in the repr of a dict of pydantic's."""
INTERNAL = re.compile(r"[\[\](){}]|^[A-Z]\w*$|-")
"""Parts of a place that name pydantic's own steps and classes of unions, not fields."""
TYPES = re.compile(r"str|int|float|bool|bytes|list|tuple|dict|set|complex|none|nullable|union|chain|default|body")
"""Other such parts, and the whole body."""
ADVICE_TO_DEPLOYER = re.compile(
    r" ?(?:To increase this limit, s|S)et (?:the )?VLLM_\w+ (?:environment variable|to increase this limit)\.?"
)
"""Advice to whoever starts the engine. Not `\\s*` at its start: that takes quadratic time in a run of blanks."""
MAX_FIELDS = 3
"""Fields that a message names."""
MAX_MESSAGE_CHARS = 4096
"""Characters of a message that are read and kept. vLLM repeats the request's values, which may be megabytes, in its messages."""


def plain(message: str) -> str:
    """The message without what only the engine's own log and operators can make use of, cut to MAX_MESSAGE_CHARS."""
    message = shorten(message)
    if "See stack trace" in message:
        return f"{STOPPED}."
    if VALIDATION.match(message) and (found := _fields(message)):
        more = "; and more" if len(found) > MAX_FIELDS else ""
        listed = "; ".join(f"{field}: {text}" if field else text for field, text in list(found.items())[:MAX_FIELDS])
        return f"{listed}{more}."
    return ADVICE_TO_DEPLOYER.sub("", message).strip()


def shorten(message: str) -> str:
    """The first MAX_MESSAGE_CHARS characters of a message, and ` ...` if there are more."""
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]} ..."


def plain_field(param: str | None) -> str | None:
    """A field as clients know it: pydantic's place of it without the body, which all of them are in."""
    return None if param in (None, "body") else shorten(str(param)).removeprefix("body.")


def _fields(message: str) -> dict[str, str]:
    """The first error of each of the first MAX_FIELDS + 1 fields; a field of a union has one error for each branch."""
    found: dict[str, str] = {}
    for match in ITEM.finditer(message):
        try:
            place, text = ast.literal_eval(match["loc"]), ast.literal_eval(match["msg"])
        except (ValueError, SyntaxError):
            return {}
        parts = [str(part) for part in place if not (INTERNAL.search(str(part)) or TYPES.fullmatch(str(part)))]
        text = str(text).removeprefix("Value error, ").removeprefix("Assertion failed, ").strip()
        found.setdefault(".".join(parts), ADVICE_TO_DEPLOYER.sub("", text).rstrip(". "))
        if len(found) > MAX_FIELDS:
            break
    return found
