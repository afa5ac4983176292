"""Check of examples for fine-tuning, in OpenAI's formats: chat, completion and preference (DPO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from tandem.files.checks.lines import check_lines
from tandem.files.checks.report import Finding, Report

MAX_EXAMPLES = 10**6
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CHAT, COMPLETION, PREFERENCE = "chat", "completion", "preference"
KEYS = {
    CHAT: ("messages",),
    COMPLETION: ("prompt", "completion"),
    PREFERENCE: ("input", "preferred_output", "non_preferred_output"),
}
"""Fields by which the format of an example is known."""
Problem = tuple[str, str]
"""The field at fault, and the message."""


def check_training(chunks: Iterable[bytes]) -> Report:
    """The problems of examples, which all have the format of the first."""
    check = _ExampleCheck()
    report = check_lines(chunks, check.problems, max_rows=MAX_EXAMPLES, what="examples")
    return dataclasses.replace(report, format=check.format)


class _ExampleCheck:
    """The check of one file."""

    def __init__(self) -> None:
        self.format: str | None = None

    def problems(self, line: int, example: dict[str, Any]) -> Iterator[Finding]:
        """The problems of one example."""
        found = format_of(example)
        if found is None:
            fields = "; ".join(", ".join(f"`{key}`" for key in keys) for keys in KEYS.values())
            yield Finding(
                code="invalid_example", message=f"The example has none of these sets of fields: {fields}.", line=line
            )
            return
        if self.format is None:
            self.format = found
        if found != self.format:
            yield Finding(
                code="mixed_formats",
                message=f"The example has the format {found}, and the first one {self.format}. Use one format.",
                line=line,
            )
            return
        for param, message in PROBLEMS[found](example):
            yield Finding(code="invalid_example", message=message, line=line, param=param)


def format_of(example: dict[str, Any]) -> str | None:
    """The format of an example; None: it has none."""
    return next((name for name, keys in KEYS.items() if any(key in example for key in keys)), None)


def chat_problems(example: dict[str, Any]) -> Iterator[Problem]:
    """`messages` with an answer of the assistant, and `tools`."""
    yield from message_problems(example.get("messages"), "messages")
    messages = example["messages"] if isinstance(example.get("messages"), list) else []
    answers = [each for each in messages if isinstance(each, dict) and each.get("role") == "assistant"]
    if messages and not answers:
        yield "messages", "`messages` has no message of the assistant to learn from."
    elif answers and all(answer.get("weight") == 0 for answer in answers):
        yield "messages", "All messages of the assistant have the weight 0: there is nothing to learn from."
    yield from tool_problems(example.get("tools"), "tools")
    if not isinstance(example.get("parallel_tool_calls", True), bool):
        yield "parallel_tool_calls", "`parallel_tool_calls` must be true or false."


def completion_problems(example: dict[str, Any]) -> Iterator[Problem]:
    """`prompt`, which may be empty, and `completion`."""
    for key in KEYS[COMPLETION]:
        if not isinstance(example.get(key), str):
            yield key, f"`{key}` must be a text."
    if example.get("completion") == "":
        yield "completion", "`completion` is empty: there is nothing to learn from."


def preference_problems(example: dict[str, Any]) -> Iterator[Problem]:
    """`input` with messages, and an answer of the assistant that is preferred to another one."""
    context = example.get("input")
    if isinstance(context, dict):
        yield from message_problems(context.get("messages"), "input.messages")
        yield from tool_problems(context.get("tools"), "input.tools")
    else:
        yield "input", "`input` must be an object with `messages`."
    for key in ("preferred_output", "non_preferred_output"):
        answer = example.get(key)
        yield from message_problems(answer, key)
        last = answer[-1] if isinstance(answer, list) and answer else None
        if isinstance(last, dict) and last.get("role") != "assistant":
            yield key, f"`{key}` must end with a message of the assistant."


PROBLEMS = {CHAT: chat_problems, COMPLETION: completion_problems, PREFERENCE: preference_problems}


def message_problems(messages: object, path: str) -> Iterator[Problem]:
    """The problems of a list of messages."""
    if not isinstance(messages, list) or not messages:
        yield path, f"`{path}` must be a list of one message or more."
        return
    for place, message in enumerate(messages):
        where = f"{path}[{place}]"
        if not isinstance(message, dict):
            yield where, f"`{where}` must be an object."
            continue
        role = message.get("role")
        if role not in ROLES:
            yield f"{where}.role", f"`{where}.role` must be one of {', '.join(ROLES)}."
        yield from _content_problems(message, where)
        if "weight" in message and (role != "assistant" or message["weight"] not in (0, 1)):
            yield f"{where}.weight", f"`{where}.weight` must be 0 or 1, of a message of the assistant."
        if role == "tool" and not isinstance(message.get("tool_call_id"), str):
            yield f"{where}.tool_call_id", f"`{where}.tool_call_id` must name the call that the message answers."
        yield from _call_problems(message.get("tool_calls"), f"{where}.tool_calls")


def _content_problems(message: dict[str, Any], where: str) -> Iterator[Problem]:
    content = message.get("content")
    calls = message.get("role") == "assistant" and (message.get("tool_calls") or message.get("function_call"))
    if isinstance(content, str) or (content is None and calls):
        return
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        return
    yield f"{where}.content", f"`{where}.content` must be a text or a list of parts with a `type`."


def _call_problems(calls: object, path: str) -> Iterator[Problem]:
    if calls is None:
        return
    if not isinstance(calls, list) or not calls:
        yield path, f"`{path}` must be a list of one call or more."
        return
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("arguments"), str)
        ):
            yield f"{path}[{place}]", f"`{path}[{place}].function` must have a `name` and `arguments`, both texts."


def tool_problems(tools: object, path: str) -> Iterator[Problem]:
    """The problems of a list of tools."""
    if tools is None:
        return
    if not isinstance(tools, list):
        yield path, f"`{path}` must be a list."
        return
    for place, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            yield f"{path}[{place}]", f"`{path}[{place}]` must be a function with a `name`."
        elif not isinstance(function.get("parameters", {}), dict):
            yield (
                f"{path}[{place}].function.parameters",
                f"`{path}[{place}].function.parameters` must be a JSON schema.",
            )
