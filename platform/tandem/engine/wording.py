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
DEPLOYER = re.compile(
    r"\s*(?:To increase this limit, s|S)et (?:the )?VLLM_\w+ (?:environment variable|to increase this limit)\.?"
)
"""Advice to whoever starts the engine."""
MOST = 3
"""How many fields a message names."""


def plain(message: str) -> str:
    """The message without what only the engine's own log and operators can make use of; others stay as they are."""
    if "See stack trace" in message:
        return f"{STOPPED}."
    if VALIDATION.match(message) and (found := _fields(message)):
        more = f"; and {len(found) - MOST} more" if len(found) > MOST else ""
        listed = "; ".join(f"{field}: {text}" if field else text for field, text in list(found.items())[:MOST])
        return f"{listed}{more}."
    return DEPLOYER.sub("", message)


def plain_field(param: str | None) -> str | None:
    """A field as clients know it: pydantic's place of it without the body, which all of them are in."""
    return None if param in (None, "body") else str(param).removeprefix("body.")


def _fields(message: str) -> dict[str, str]:
    """What is wrong with each field: the first of its errors, where several branches of a union were tried."""
    found: dict[str, str] = {}
    for match in ITEM.finditer(message):
        try:
            place, text = ast.literal_eval(match["loc"]), ast.literal_eval(match["msg"])
        except (ValueError, SyntaxError):
            return {}
        parts = [str(part) for part in place if not (INTERNAL.search(str(part)) or TYPES.fullmatch(str(part)))]
        text = str(text).removeprefix("Value error, ").removeprefix("Assertion failed, ").strip()
        found.setdefault(".".join(parts), DEPLOYER.sub("", text).rstrip("."))
    return found
