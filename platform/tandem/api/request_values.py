"""Validation of the values of requests, stricter than vLLM's own, before an engine gets them. Pure.

Gateways validate requests with it, and batch runs validate rows. It refuses what vLLM would answer with status 500 or with a
message about its own classes: sampling parameters, stop texts, messages, JSON schemas, integers above 64 bits. vLLM validates
everything else, and the values that pass again. Like vLLM, it takes numbers as text too ("0.5").
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from tandem.api.bounded_json import InvalidJsonError, check_size
from tandem.api.messages import input_problem, message_problem
from tandem.api.request_fields import REQUEST_FIELDS
from tandem.api.schema_checks import may_have_problem, schema_problem
from tandem.api.values import INT_MAX, INT_MIN, Problem, format_value, is_integer, is_number, kind
from tandem.api.walks import containers, dotted

RESPONSES = "/v1/responses"
GENERATE_ROUTES = ("/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/messages")
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Fields of `structured_outputs` of which exactly one is set."""
MAX_PROBLEMS = 3
"""Problems in one answer at most."""


REQUIRED: dict[str, tuple[tuple[str, ...], ...]] = {
    "/v1/chat/completions": (("messages",),),
    "/v1/completions": (("prompt", "prompt_embeds"),),
    RESPONSES: (("input",),),
    "/v1/messages": (("messages",), ("max_tokens",)),
    "/v1/messages/count_tokens": (("messages",),),
    "/v1/embeddings": (("input", "messages"),),
    "/v1/score": (("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")),
    "/score": (("text_1", "queries", "data_1"), ("text_2", "documents", "items", "data_2")),
    "/v1/rerank": (("query",), ("documents",)),
    "/v2/rerank": (("query",), ("documents",)),
    "/rerank": (("query",), ("documents",)),
    "/tokenize": (("prompt", "messages"),),
    "/detokenize": (("tokens",),),
}
"""Fields that a request must have: one of each group."""


class Range(NamedTuple):
    """The numbers that a field takes."""

    minimum: float
    maximum: float = math.inf
    integral: bool = False
    exclusive_minimum: bool = False
    """Whether `minimum` itself is too small."""

    def has(self, value: Any) -> bool:
        """Whether a value is one of them."""
        if not (is_integer(value) if self.integral else is_number(value)):
            return False
        number = value if isinstance(value, int) else float(value)
        return (self.minimum < number if self.exclusive_minimum else self.minimum <= number) and number <= self.maximum

    def description(self) -> str:
        """`a number from 0 to 2`."""
        low = f"{'above' if self.exclusive_minimum else 'from'} {self.minimum:g}"
        if self.integral:
            return f"a whole number {low} to 2^64-1"
        if self.maximum == math.inf:
            return f"a number {low}"
        return f"a number {low} {'and at most' if self.exclusive_minimum else 'to'} {self.maximum:g}"


INTEGRAL = Range(0, INT_MAX, integral=True)
RANGES = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, exclusive_minimum=True),
    "min_p": Range(0, 1),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, exclusive_minimum=True),
    "top_k": INTEGRAL._replace(minimum=-1),
    "n": INTEGRAL._replace(minimum=1),
    "max_tokens": INTEGRAL,
    "max_completion_tokens": INTEGRAL,
    "max_output_tokens": INTEGRAL,
    "min_tokens": INTEGRAL,
    "top_logprobs": INTEGRAL._replace(minimum=-1),
    "prompt_logprobs": INTEGRAL._replace(minimum=-1),
    "stream_interval": INTEGRAL._replace(minimum=1),
}
"""Fields that mean the same in every API that has them."""
SENT_FIELDS = (
    *("allowed_token_ids", "best_of", "bad_words", "dimensions", "length_penalty", "logit_bias", "logprob_token_ids"),
    *("logprobs", "priority", "repetition_detection", "routed_experts_prompt_start", "seed", "stop_token_ids"),
    *("thinking_token_budget", "truncate_prompt_tokens", "vllm_xargs", "structured_outputs", "response_format"),
    *("text", "output_config"),
)
"""Other fields whose integers vLLM sends to its processes. It checks token ids of prompts against the vocabulary itself."""
TOOL_SCHEMAS = ("function.parameters", "parameters", "input_schema")
"""Places of a tool's schema: chat completions, Responses, Anthropic."""


def value_problems(
    path: str, body: dict[str, Any], raw: bytes | None = None, max_schema_chars: float = math.inf
) -> list[Problem]:
    """The first values, at most MAX_PROBLEMS, that a request to the route `path` cannot have; empty: nothing was found.

    `raw`, the body as it came, makes the check of schemas cheap. Schemas given as text are not read above `max_schema_chars`:
    the caps of a gateway refuse them.
    """
    return list(itertools.islice(_problems(path, body, raw, max_schema_chars), MAX_PROBLEMS))


def missing_fields(path: str, body: dict[str, Any]) -> list[Problem]:
    """Required fields that a request to the route `path` lacks or has as null."""
    problems = []
    for group in REQUIRED.get(path, ()):
        if all(body.get(name) is None for name in group):
            alternatives = f" (or {', '.join(group[1:])})" if group[1:] else ""
            problems.append(Problem(group[0], f"is missing or null; a request to {path} must have it{alternatives}"))
    return problems


def _problems(path: str, request: dict[str, Any], raw: bytes | None, max_schema_chars: float) -> Iterator[Problem]:
    # Neither the gateway nor an engine reads fields that a route does not have.
    body = {name: value for name, value in request.items() if name in REQUEST_FIELDS.get(path, ())}
    if path in GENERATE_ROUTES:
        for name, numbers in RANGES.items():
            value = body.get(name)
            if value is not None and not numbers.has(value):
                yield Problem(name, f"is {format_value(value)}; it must be {numbers.description()}")
        for name in ("stop", "stop_sequences"):
            if body.get(name) is not None:
                yield from _stop(name, body[name])
        yield from _structured_outputs(body.get("structured_outputs"))
        yield from _schemas(body, raw, max_schema_chars)
    if "messages" in body and (problem := message_problem(path, body["messages"])):
        yield problem
    if path == RESPONSES and "input" in body and (problem := input_problem(body["input"])):
        yield problem
    for name in SENT_FIELDS:
        if name in body:
            yield from _too_large(name, body[name])
    if path in GENERATE_ROUTES:
        for name, schema in _tool_schemas(body):
            yield from _too_large(name, schema)


def _stop(name: str, value: Any) -> Iterator[Problem]:
    # vLLM checks their number: its limit is VLLM_MAX_STOP_STRINGS of a model's `env` or of its node.
    texts = value if isinstance(value, list) else [value] if name == "stop" else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        expected = "text or an array of texts" if name == "stop" else "an array of texts"
        yield Problem(name, f"is {kind(value)}; it must be {expected}")
    elif not all(texts):
        yield Problem(name, "has an empty text, which every answer would end with. Leave it out")


def _structured_outputs(value: Any) -> Iterator[Problem]:
    if value is None:
        return
    name = "structured_outputs"
    if not isinstance(value, dict):
        yield Problem(name, f"is {kind(value)}; it must be an object with one of {', '.join(CONSTRAINTS)}")
        return
    constraints = [key for key in CONSTRAINTS if value.get(key) is not None]
    if len(constraints) != 1:
        yield Problem(
            name, f"has {' and '.join(constraints) or 'no constraint'}; it must have one of {', '.join(CONSTRAINTS)}"
        )
        return
    (key,) = constraints
    constraint = value[key]
    is_choice = isinstance(constraint, list) and constraint and all(isinstance(text, str) for text in constraint)
    checks: dict[str, tuple[bool, str]] = {
        "json": (isinstance(constraint, dict | str), "a JSON schema"),
        "choice": (bool(is_choice), "an array of one text or more"),
        "json_object": (constraint is True, "true, or left out"),
    }
    is_valid, expected = checks.get(
        key, (isinstance(constraint, str) and bool(constraint.strip()), "text that is not empty")
    )
    if not is_valid:
        yield Problem(f"{name}.{key}", f"is {format_value(constraint)}; it must be {expected}")


def _schemas(body: dict[str, Any], raw: bytes | None, max_chars: float) -> Iterator[Problem]:
    schemas = list(_answer_schemas(body))
    if not schemas or (raw is not None and not may_have_problem(raw)):
        return
    for name, schema in schemas:
        if isinstance(schema, str):
            if len(schema) > max_chars:
                continue
            try:
                schema = _read_schema(schema)
            except InvalidJsonError:
                yield Problem(
                    name,
                    "has, as JSON, more objects, values and texts than a whole request may have, or a number of 20 or more "
                    "digits. Send a smaller schema",
                )
                continue
        problem = schema_problem(schema)
        if problem is not None:
            yield Problem(dotted((name, *problem.path)), problem.text)


def _read_schema(text: str) -> Any:
    """The schema in a text; None for one that is not JSON, which vLLM refuses with a clear message.

    InvalidJsonError for one with more values than a body may have: in the body it counted as one text.
    """
    check_size(text.encode(errors="surrogatepass"))
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _answer_schemas(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The JSON schemas that an answer has to follow, and the field of each; as text, or read."""
    schema = _nested_value(body, "structured_outputs", "json")
    if schema is not None:
        yield "structured_outputs.json", schema
    for path in (
        ("response_format", "json_schema", "schema"),
        ("text", "format", "schema"),
        ("output_config", "format", "schema"),
    ):
        schema = _nested_value(body, *path)
        if isinstance(schema, dict | list):
            yield ".".join(path), schema
    yield from _tool_schemas(body)


def _tool_schemas(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas of tools that an answer has to follow: with a tool choice other than `auto`, or where a tool is strict."""
    tools = body.get("tools")
    if not isinstance(tools, list):
        return
    choice = body.get("tool_choice") or "auto"
    choice_type = choice.get("type") if isinstance(choice, dict) else choice
    chosen_tool = _nested_value(choice, "function", "name") or _nested_value(choice, "name")
    if choice_type == "none" or (choice_type == "auto" and not any(_strict(tool) is True for tool in tools)):
        return
    for index, tool in enumerate(tools):
        if chosen_tool is not None and chosen_tool not in (
            _nested_value(tool, "function", "name"),
            _nested_value(tool, "name"),
        ):
            continue
        if choice_type == "auto" and _strict(tool) is False:
            continue
        for field in TOOL_SCHEMAS:
            schema = _nested_value(tool, *field.split("."))
            if schema is not None:
                yield f"tools.{index}.{field}", schema


def _strict(tool: Any) -> Any:
    strict = _nested_value(tool, "function", "strict")
    return _nested_value(tool, "strict") if strict is None else strict


def _nested_value(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _too_large(name: str, value: Any) -> Iterator[Problem]:
    """Integers of a field that do not fit 64 bits, which vLLM's processes cannot send each other."""
    if not _has_large(value):
        return
    for path, container in containers([value]):
        entries = container.items() if isinstance(container, dict) else enumerate(container)
        for key, entry in entries:
            if isinstance(entry, int) and not INT_MIN <= entry <= INT_MAX:
                # The first key is the place of `value` itself.
                field = dotted((name, *[*path, key][1:]))
                yield Problem(field, f"is {format_value(entry)}; integers here are from -2^63 to 2^64-1")


def _has_large(value: Any) -> bool:
    # Without the paths, which take most of the time.
    stack = [[value]]
    while stack:
        for entry in stack.pop():
            if isinstance(entry, str):
                continue
            if isinstance(entry, dict):
                stack.append(list(entry.values()))
            elif isinstance(entry, list):
                stack.append(entry)
            elif isinstance(entry, int) and not INT_MIN <= entry <= INT_MAX:
                return True
    return False
