"""Answers assembled from what their clients got: bodies, and streams in any number of pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from tandem.stored.assembly import assemble
from tandem.stored.records import AnswerKind

HEAD = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "base"}


def stream(*events: dict[str, Any], done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, *(["data: [DONE]\n\n"] if done else [])]).encode()


def chunk(index: int = 0, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return HEAD | {"choices": [{"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}]}


def chat(body: bytes) -> dict[str, Any] | None:
    return assemble(AnswerKind.CHAT, body, is_stream=True)


@given(pieces=st.lists(st.text(max_size=5), min_size=1, max_size=8), choices=st.integers(1, 3))
def test_a_chats_stream_adds_up_to_what_openais_sdk_makes_of_it(pieces: list[str], choices: int) -> None:
    events = [chunk(n, role="assistant", content="") for n in range(choices)]
    events += [chunk(n, content=piece) for piece in pieces for n in range(choices)]
    events += [chunk(n, "stop") for n in range(choices)]
    events.append(HEAD | {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}})
    state = ChatCompletionStreamState()
    for event in events:
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    expected = state.get_final_completion().model_dump(exclude_none=True)
    made = chat(stream(*events))
    assert made is not None
    for each, other in zip(made["choices"], expected["choices"], strict=True):
        assert each["message"]["content"] == other["message"]["content"] == "".join(pieces)
        assert (each["index"], each["finish_reason"]) == (other["index"], other["finish_reason"])
    assert made["usage"] == expected["usage"] and made["object"] == "chat.completion"


def test_tool_calls_are_merged_by_their_index() -> None:
    def call(index: int, **values: Any) -> dict[str, Any]:
        return chunk(tool_calls=[{"index": index, **values}])

    made = chat(
        stream(
            call(0, id="a", type="function", function={"name": "f", "arguments": ""}),
            call(0, function={"arguments": '{"x":'}),
            call(1, id="b", type="function", function={"name": "g", "arguments": "{}"}),
            call(0, function={"arguments": "1}"}),
            chunk(finish="tool_calls"),
        )
    )
    assert made is not None and made["choices"][0]["message"]["content"] is None
    assert made["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_log_probabilities_and_reasoning_are_appended() -> None:
    def token(text: str) -> dict[str, Any]:
        return HEAD | {
            "choices": [{"index": 0, "delta": {"reasoning": text}, "logprobs": {"content": [{"token": text}]}}]
        }

    made = chat(stream(token("a"), token("b"), chunk(finish="stop")))
    assert made is not None and made["choices"][0]["message"]["reasoning"] == "ab"
    assert made["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}


@pytest.mark.parametrize(
    "body",
    [
        stream(chunk(content="a"), done=False),
        stream(chunk(content="a"), {"error": {"message": "no memory"}}),
        stream(),
        b"data: {\n\ndata: [DONE]\n\n",
        b'data: {"id":"c1"}\n\ndata: [DONE]\n\n',
        b"",
    ],
)
def test_a_stream_that_is_not_whole_is_no_answer(body: bytes) -> None:
    assert chat(body) is None


def test_a_responses_stream_has_the_response_in_its_last_event() -> None:
    whole = {"id": "r1", "object": "response", "output": [{"text": "says response.completed"}]}
    events = [
        {"type": "response.created", "response": whole | {"output": []}},
        {"type": "response.output_text.delta", "delta": 'data: "response.completed"'},
    ]
    assert assemble(AnswerKind.RESPONSE, stream(*events, done=False), is_stream=True) is None
    for end in ("completed", "incomplete", "failed"):
        last = {"type": f"response.{end}", "response": whole}
        assert assemble(AnswerKind.RESPONSE, stream(*events, last, done=False), is_stream=True) == whole


@given(st.binary(max_size=200), st.booleans(), st.sampled_from(AnswerKind))
def test_no_bytes_make_it_fail(body: bytes, is_stream: bool, kind: AnswerKind) -> None:
    made = assemble(kind, body, is_stream=is_stream)
    assert made is None or isinstance(made["id"], str)
