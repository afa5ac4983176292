"""Wrong values of a request are found before an engine sees them, and named by their field."""

from __future__ import annotations

import base64
import random
import time
import tracemalloc
from typing import Any

import pytest

from tandem.api.messages import message_problem
from tandem.api.request_values import CONSTRAINTS, value_problems
from tandem.api.values import Problem

CHAT, RESPONSES, ANTHROPIC = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def value_problem(path: str, body: dict[str, Any], raw: bytes | None = None) -> Problem | None:
    return next(iter(value_problems(path, body, raw)), None)


def test_several_wrong_values_are_told_at_once_and_at_most_three() -> None:
    body = {"temperature": "hot", "top_p": 3, "stop": {}, "n": 0}
    assert [problem.field for problem in value_problems(CHAT, body)] == ["temperature", "top_p", "n"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"temperature": "hot"}, "`temperature` is 'hot'; it must be a number from 0 to 2."),
        ({"temperature": 1e30}, "`temperature` is 1e+30; it must be a number from 0 to 2."),
        ({"top_p": 0}, "`top_p` is 0; it must be a number above 0 and at most 1."),
        ({"repetition_penalty": -1}, "`repetition_penalty` is -1; it must be a number above 0."),
        ({"top_k": 1e30}, "`top_k` is 1e+30; it must be a whole number from -1 to 2^64-1."),
        ({"top_k": 1.5}, "`top_k` is 1.5; it must be a whole number from -1 to 2^64-1."),
        ({"max_tokens": [3]}, "`max_tokens` is an array; it must be a whole number from 0 to 2^64-1."),
        ({"top_k": 10**5000}, "`top_k` is a number of more than 60 digits; it must be a whole number from -1 to 2^64-1."),
        ({"stop": {}}, "`stop` is an object; it must be text or an array of texts."),
        ({"stop": ["a", 3]}, "`stop` is an array; it must be text or an array of texts."),
        ({"stop": ""}, "`stop` has an empty text, which every answer would end with. Leave it out."),
        ({"vllm_xargs": {"a": [10**30]}}, f"`vllm_xargs.a.0` is {10**30}; integers here are from -2^63 to 2^64-1."),
        (
            {"structured_outputs": "x"},
            f"`structured_outputs` is text; it must be an object with one of {', '.join(CONSTRAINTS)}.",
        ),
        (
            {"structured_outputs": {"json": {}, "regex": "a"}},
            f"`structured_outputs` has json and regex; it must have one of {', '.join(CONSTRAINTS)}.",
        ),
        ({"structured_outputs": {"json": 3}}, "`structured_outputs.json` is 3; it must be a JSON schema."),
        (
            {"structured_outputs": {"choice": []}},
            "`structured_outputs.choice` is an array; it must be an array of one text or more.",
        ),
        ({"structured_outputs": {"grammar": " "}}, "`structured_outputs.grammar` is ' '; it must be text that is not empty."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_field_and_what_it_must_be(body: dict[str, Any], said: str) -> None:
    assert str(value_problem(CHAT, body)) == said


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": '{"$ref": "#"}'}}, "structured_outputs.json"),
        ({"response_format": {"json_schema": {"schema": {"allOf": [{"$ref": "#"}]}}}}, "response_format.json_schema.schema"),
        ({"text": {"format": {"schema": {"$ref": "#"}}}}, "text.format.schema"),
        (
            {"tools": [{"function": {"parameters": {"$ref": "#"}}}], "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        (
            {"tools": [{"input_schema": {"properties": {"a": {"minItems": 1e9}}}}], "tool_choice": {"type": "any"}},
            "tools.0.input_schema.properties.a.minItems",
        ),
    ],
)  # fmt: skip
def test_a_schema_without_an_answer_is_refused_wherever_it_stands(body: dict[str, Any], field: str) -> None:
    route = RESPONSES if "text" in body else ANTHROPIC if "input_schema" in str(body) else CHAT
    problem = value_problem(route, body)
    assert problem is not None and problem.field == field


@pytest.mark.parametrize(
    "body",
    [
        {
            "temperature": "0.5",
            "max_tokens": "3",
            "top_k": -1,
            "n": 2.0,
            "top_p": 1,
            "seed": -(2**63),
            "logprobs": True,
        },
        {"stop": ["a"] * 4, "stop_sequences": [], "structured_outputs": {"choice": ["a"]}, "top_k": 2**64 - 1},
        {"structured_outputs": {"json": "{", "disable_any_whitespace": True}},
        {"response_format": "x", "text": "x", "tools": "x"},
    ],
)
def test_values_that_vllm_takes_or_explains_itself_pass(body: dict[str, Any]) -> None:
    assert value_problem(CHAT, body) is None


def test_the_number_of_stop_texts_is_left_to_vllm() -> None:
    assert value_problem(CHAT, {"stop": ["a"] * 16}) is None
    assert value_problem(ANTHROPIC, {"stop_sequences": ["a"] * 16}) is None


def tools(**changes: Any) -> list[dict[str, Any]]:
    """Two tools for chats: one with a schema that no grammar can be made of, and a good one."""
    bad = {"type": "function", "function": {"name": "bad", "parameters": {"$ref": "#"}, **changes}}
    return [bad, {"type": "function", "function": {"name": "good", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize(
    ("choice", "changes", "refused"),
    [
        (None, {}, False),
        ("none", {"strict": True}, False),
        ("auto", {}, False),
        ("auto", {"strict": False}, False),
        ("auto", {"strict": True}, True),
        ("required", {}, True),
        ({"type": "function", "function": {"name": "bad"}}, {}, True),
        ({"type": "function", "function": {"name": "good"}}, {}, False),
        ({"type": "allowed_tools"}, {}, True),
    ],
)
def test_tools_are_checked_where_they_constrain_the_answer(choice: Any, changes: dict[str, Any], refused: bool) -> None:
    large = {"parameters": {"maximum": 2**256 - 1}}
    for given in (changes, {**changes, **large}):
        body = {"tools": tools(**given), "tool_choice": choice}
        assert (value_problem(CHAT, body) is not None) == refused


def test_large_integers_pass_where_they_stay_in_vllms_first_process() -> None:
    for name in ("metadata", "chat_template_kwargs", "mm_processor_kwargs"):
        assert value_problem(CHAT, {name: {"a": [2**256 - 1]}}) is None
    for name in ("seed", "logit_bias", "allowed_token_ids", "response_format"):
        value: Any = 2**256 - 1
        body = {name: value if name == "seed" else [value] if name == "allowed_token_ids" else {"a": value}}
        problem = value_problem(CHAT, body)
        assert problem is not None and problem.field.startswith(name)


def test_a_schema_is_not_walked_if_the_body_has_none_of_the_keywords(monkeypatch: pytest.MonkeyPatch) -> None:
    walked: list[Any] = []
    monkeypatch.setattr("tandem.api.request_values.schema_problem", walked.append)
    body = {"structured_outputs": {"json": {"type": "object"}}}
    assert value_problem(CHAT, body, b'{"structured_outputs": {"json": {"type": "object"}}}') is None and not walked
    for raw in (rb'{"\u0024ref": "#"}', b'{"json": "{\\"minItems\\": 1e9}"}', b'{"$ref": "#"}', b"x" * (2 << 20)):
        value_problem(CHAT, body, raw)
    assert len(walked) == 4


class Unread(list[Any]):
    """An array that nobody may read."""

    def __iter__(self) -> Any:
        raise AssertionError("it was read")


def test_prompts_of_token_ids_are_not_walked() -> None:
    assert value_problem("/v1/completions", {"prompt": Unread([1])}) is None
    assert value_problem("/v1/embeddings", {"input": Unread([1])}) is None


def test_a_large_body_is_not_searched() -> None:
    raw = base64.b64encode(random.Random(0).randbytes(8 << 20))
    part = {"type": "image_url", "image_url": {"url": raw.decode()}}
    body = {"messages": [{"role": "user", "content": [part]}], "structured_outputs": {"json": {"type": "object"}}}
    began = time.process_time()
    assert value_problem(CHAT, body, raw) is None
    assert time.process_time() - began < 0.03


def test_fields_that_a_route_does_not_have_are_not_checked() -> None:
    assert value_problem(CHAT, {"stop_sequences": 3, "max_output_tokens": "x", "input": 3}) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (3, "`input` is a number; it must be text or an array of items."),
        ([3], "`input.0` is a number; it must be an object, such as {'role': 'user', 'content': ...}."),
        ([{"role": "user", "content": 3}], "`input.0.content` is a number; it must be text or an array of parts."),
        ([{"role": "user", "content": None}], "`input.0.content` is null; it must be text or an array of parts."),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": 3}]}],
            "`input.0.content.0.text` is a number; it must be text.",
        ),
    ],
)
def test_a_wrong_input_of_responses_is_told_with_the_path_of_its_field(value: Any, said: str) -> None:
    assert str(value_problem(RESPONSES, {"input": value})) == said


def test_items_of_responses_pass() -> None:
    reasoning = {"type": "reasoning", "id": "r", "summary": [], "content": None}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    told = {"type": "function_call_output", "call_id": "c", "output": "rain"}
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "x", "annotations": []}],
    }
    items = ["x", [{"role": "user", "content": "x"}, said, reasoning, call, told], []]
    assert [value_problem(RESPONSES, {"input": item}) for item in items] == [None] * 3


def test_routes_that_generate_nothing_have_no_sampling_values() -> None:
    assert value_problem("/v1/embeddings", {"stop": 3, "temperature": "hot", "input": [[1, 2]]}) is None
    assert value_problem("/v1/embeddings", {"dimensions": 10**30}) is not None


def test_numbers_in_texts_are_not_numbers() -> None:
    text = "1" * 100
    assert value_problem("/v1/completions", {"prompt": text}, text.encode()) is None


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("x", "`messages` is text; it must be an array of messages."),
        ([], "`messages` is empty; it must have at least one message."),
        ([3], "`messages.0` is a number; it must be an object with role and content."),
        ([{}], "`messages.0.role` is missing; it must be text, such as 'user' or 'assistant'."),
        ([{"role": 3}], "`messages.0.role` is a number; it must be text, such as 'user' or 'assistant'."),
        ([{"role": "user", "content": 3}], "`messages.0.content` is a number; it must be text or an array of parts."),
        ([{"role": "user", "content": None}], "`messages.0.content` is null; it must be text or an array of parts."),
        ([{"role": "user", "content": {}}], "`messages.0.content` is an object; it must be text or an array of parts."),
        (
            [{"role": "user", "content": [3]}],
            "`messages.0.content.0` is a number; it must be an object with a type, such as {'type': 'text', 'text': ...}.",
        ),
        ([{"role": "user", "content": [{}]}], "`messages.0.content.0.type` is missing; it must be text, such as 'text'."),
        ([{"role": "user", "content": [{"type": "text"}]}], "`messages.0.content.0.text` is missing; it must be text."),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}],
            "`messages.0.content.0.text` is a number; it must be text.",
        ),
        ([{"role": "user", "content": "x", "name": 3}], "`messages.0.name` is a number; it must be text."),
        ([{"role": "tool", "content": "x", "tool_call_id": 3}], "`messages.0.tool_call_id` is a number; it must be text."),
        ([{"role": "assistant", "tool_calls": "x"}], "`messages.0.tool_calls` is text; it must be an array of calls."),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a"}]}],
            "`messages.0.tool_calls.0.function` is missing; it must be an object with name and arguments.",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
            "`messages.0.tool_calls.0.function.arguments` is an object; it must be JSON as text.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_message_is_told_with_the_path_of_its_field(messages: Any, said: str) -> None:
    assert str(message_problem(CHAT, messages)) == said


def test_anthropics_messages_have_three_roles_and_always_content() -> None:
    assert str(message_problem(ANTHROPIC, [{"role": "tool", "content": "x"}])) == (
        "`messages.0.role` is 'tool'; it must be one of user, assistant, system."
    )
    assert str(message_problem(ANTHROPIC, [{"role": "user"}])).startswith("`messages.0.content` is missing;")


def test_a_conversation_with_tools_and_parts_passes() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    assert message_problem(CHAT, talk) is None
    result = {"type": "tool_result", "tool_use_id": "c", "content": "rain"}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    talk = [{"role": "assistant", "content": [thought]}, {"role": "user", "content": [result]}]
    assert message_problem(ANTHROPIC, talk) is None


@pytest.mark.parametrize(
    "part",
    [
        {"image_url": "https://example.com/a.png"},
        {"audio_url": {"url": "https://example.com/a.wav"}},
        {"image_embeds": None, "uuid": "a"},
        {"type": None, "text": "x"},
        {"refusal": "no"},
        {"type": "text", "text": None},
        {"type": "refusal", "refusal": None},
    ],
)
def test_parts_that_vllm_accepts_in_chats_pass_there_only(part: dict[str, Any]) -> None:
    talk = [{"role": "user", "content": [part]}]
    assert message_problem(CHAT, talk) is None
    for path, body in ((RESPONSES, {"input": talk}), (ANTHROPIC, {"messages": talk})):
        problem = value_problem(path, body)
        assert problem is not None and ".content.0." in problem.field


def test_the_content_of_a_functions_message_may_be_null() -> None:
    assert message_problem(CHAT, [{"role": "function", "name": "f", "content": None}]) is None


def test_a_large_integer_deep_in_a_field_takes_no_memory_for_the_paths_of_its_neighbours() -> None:
    value: Any = [{} for _ in range(20_000)] + [-(10**19) + 1]
    for level in range(20):
        value = {f"{level}" * 5000: value}
    tracemalloc.start()
    problem = value_problem(CHAT, {"messages": [{"role": "user", "content": "x"}], "vllm_xargs": value})
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problem is not None and problem.field.startswith("vllm_xargs.1919") and len(str(problem)) < 1000
    assert "integers here are from" in problem.text
    assert peak_bytes < 10 * 2**20


def test_a_schema_given_as_text_is_checked_like_one_that_is_an_object() -> None:
    body = {"structured_outputs": {"json": '{"maxItems": 1000000000}'}}
    problem = value_problem(CHAT, body)
    assert problem is not None and problem.field == "structured_outputs.json.maxItems"
    assert value_problem(CHAT, {"structured_outputs": {"json": "no JSON"}}) is None


def test_a_schema_given_as_text_is_not_read_above_the_cap_nor_with_more_values_than_a_body_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = '{"$ref": "#", "enum": [' + "{}," * 100_000 + "{}]}"
    body = {"structured_outputs": {"json": text}}
    read: list[int] = []
    monkeypatch.setattr("tandem.api.request_values.json.loads", lambda given: read.append(len(given)))
    problem = value_problem(CHAT, body)
    assert problem is not None and problem.field == "structured_outputs.json" and "smaller schema" in problem.text
    assert value_problems(CHAT, body, None, 64 * 1024) == []
    assert read == []
    value_problems(CHAT, {"structured_outputs": {"json": '{"$ref": "#"}'}}, None, 64 * 1024)
    assert read == [13]
