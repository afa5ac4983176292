"""Each API of a generative model by its maker's SDK, typed, streaming and not: a real vLLM engine behind the real gateway."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from documentation import python_blocks
from pydantic import BaseModel
from serve_fixtures import MAX_LENGTH, Served

from tandem.cluster.local import LocalCluster

ASK = "the cat sat on"
TALK: list[Any] = [{"role": "user", "content": ASK}]
GREEDY: dict[str, Any] = {"model": "red", "messages": TALK, "temperature": 0, "max_tokens": 20}
# Anthropic's SDK has no word for it, vLLM's route does.
MESSAGE: dict[str, Any] = {"model": "red", "messages": TALK, "max_tokens": 20, "extra_body": {"temperature": 0}}


class Trip(BaseModel):
    """Few enough answers for a random model to find one."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "strict": True, "parameters": PARAMETERS},
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def check_weather(arguments: str) -> None:
    """The arguments are those that the tool's schema asks for."""
    said = json.loads(arguments)
    assert set(said) == {"city", "days"} and said["city"] in ("Paris", "Rome") and said["days"] in (1, 2)


# ---- OpenAI: chat and completions


def test_chat_takes_n_seed_and_logprobs_and_counts_tokens(served: Served) -> None:
    asked = GREEDY | {"n": 2, "seed": 7, "temperature": 1.0, "logprobs": True, "top_logprobs": 3, "max_tokens": 8}
    first, again = (served.client().chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices] and texts[0] != texts[1]
    for choice in first.choices:
        assert len(choice.logprobs.content) <= 8 and len(choice.logprobs.content[0].top_logprobs) == 3
        assert choice.logprobs.content[0].logprob <= 0
    usage = first.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 16
    other = served.client().chat.completions.create(**asked | {"seed": 8})
    assert [choice.message.content for choice in other.choices] != texts


def test_an_answer_ends_before_a_stop_sequence(served: Served) -> None:
    client = served.client()
    whole = client.chat.completions.create(**GREEDY).choices[0].message.content
    found = re.search(r"[!-~]", whole[2:])
    assert found is not None
    stop = found.group()
    cut = client.chat.completions.create(**GREEDY, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole.split(stop)[0], "stop")
    said = served.anthropic().messages.create(**MESSAGE, stop_sequences=[stop])
    assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", stop)
    assert said.content[0].text == whole.split(stop)[0]


def test_completions_take_lists_of_prompts_logprobs_and_echo(served: Served) -> None:
    client = served.client()
    asked: dict[str, Any] = {"model": "tiny", "prompt": [ASK, "one two"], "max_tokens": 4, "temperature": 0}
    answer = client.completions.create(**asked, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1] and answer.choices[1].text.startswith("one two")
    answer = client.completions.create(**asked, logprobs=2)
    assert len(answer.choices[1].logprobs.tokens) == 4 and answer.choices[1].logprobs.top_logprobs[0]


def test_what_would_end_the_engine_is_refused(served: Served) -> None:
    client, before = served.client(), served.replicas()[0].id
    asked: dict[str, Any] = {"model": "tiny", "prompt": [ASK, "one two"], "max_tokens": 4}
    for wrong in ({"echo": True, "logprobs": 2}, {"extra_body": {"prompt_logprobs": 0}}):
        with pytest.raises(openai.BadRequestError, match="no logprobs of a prompt"):
            client.completions.create(**asked | wrong)
    assert client.completions.create(**asked).choices and [replica.id for replica in served.replicas()] == [before]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_tool_call_is_valid(served: Served, choice: Any, stream: bool) -> None:
    # Without the last key a random model may call the tool until its tokens are used up.
    asked = GREEDY | {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 80, "parallel_tool_calls": False}
    if stream:
        with served.client().chat.completions.stream(**asked) as chunks:
            for _ in chunks:
                pass
            answer = chunks.get_final_completion()
    else:
        answer = served.client().chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and call.id
    check_weather(call.function.arguments)


def test_a_tool_that_may_be_called_need_not_be(served: Served) -> None:
    answer = served.client().chat.completions.create(**GREEDY, tools=[WEATHER], tool_choice="auto")
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    told = {"role": "tool", "tool_call_id": "c1", "content": "rain"}
    talk = [*TALK, {"role": "assistant", "tool_calls": [call]}, told]
    after = served.client().chat.completions.create(**GREEDY | {"messages": talk}, tools=[WEATHER])
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens


def test_a_schema_gives_an_object_of_its_type(served: Served) -> None:
    answer = served.client().chat.completions.parse(**GREEDY | {"max_tokens": 80}, response_format=Trip)
    assert isinstance(answer.choices[0].message.parsed, Trip)
    with served.client().chat.completions.stream(**GREEDY | {"max_tokens": 80}, response_format=Trip) as chunks:
        for _ in chunks:
            pass
        assert chunks.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed


def test_a_schema_that_xgrammar_lacks_is_answered_too(served: Served) -> None:
    schema = {
        "type": "object", "properties": {"n": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 20}},
        "required": ["n"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = served.client().chat.completions.create(**GREEDY | {"max_tokens": 40}, response_format=form)
    assert json.loads(answer.choices[0].message.content)["n"] % 5 == 0


# ---- OpenAI: responses


def test_a_response_says_what_a_chat_says(served: Served) -> None:
    client = served.client()
    chat = client.chat.completions.create(**GREEDY)
    asked = {"model": "red", "input": ASK, "temperature": 0, "max_output_tokens": 20}
    whole = client.responses.create(**asked)
    assert whole.output_text == chat.choices[0].message.content and whole.model == "red@1"
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 3
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == whole.output_text


def test_a_response_goes_on_from_what_is_sent_with_it(served: Served) -> None:
    client = served.client()
    asked = {"model": "tiny", "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(**asked, input=ASK)
    talk = [
        {"role": "user", "content": ASK},
        *[item.model_dump() for item in first.output],
        {"role": "user", "content": "more"},
    ]
    second = client.responses.create(**asked, input=talk)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens
    with pytest.raises(openai.BadRequestError, match="Send the whole conversation"):
        client.responses.create(**asked, input="more", previous_response_id=first.id)


def test_a_response_parses_and_calls_tools(served: Served) -> None:
    client = served.client()
    asked: dict[str, Any] = {"model": "tiny", "input": ASK, "temperature": 0, "max_output_tokens": 80}
    assert isinstance(client.responses.parse(**asked, text_format=Trip).output_parsed, Trip)
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    answer = client.responses.create(**asked, tools=[tool], tool_choice={"type": "function", "name": "weather"})
    calls = [item for item in answer.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["weather"]
    check_weather(calls[0].arguments)


# ---- Anthropic


def test_a_message_says_what_a_chat_says(served: Served) -> None:
    client, chat = served.anthropic(), served.client().chat.completions.create(**GREEDY)
    whole = client.messages.create(**MESSAGE)
    assert whole.content[0].text == chat.choices[0].message.content and whole.model == "red@1"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    with client.messages.stream(**MESSAGE) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == whole.content[0].text and len(pieces) > 3
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason
    assert client.messages.count_tokens(model="red", messages=TALK).input_tokens == whole.usage.input_tokens
    longer = client.messages.count_tokens(model="red", messages=TALK, system="a dog ran over the hill")
    assert longer.input_tokens > whole.usage.input_tokens


def test_a_message_that_may_use_a_tool_need_not(served: Served) -> None:
    tool: Any = {"name": "weather", "description": "Tells it.", "input_schema": PARAMETERS}
    answer = served.anthropic().messages.create(**MESSAGE | {"tools": [tool], "tool_choice": {"type": "auto"}})
    assert answer.content[0].type == "text" and answer.content[0].text


@pytest.mark.parametrize(
    "choice",
    [{"type": "tool", "name": "weather"}, {"type": "any", "disable_parallel_tool_use": True}],
    ids=["named", "any"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_message_uses_a_tool(served: Served, stream: bool, choice: Any) -> None:
    tool: Any = {"name": "weather", "description": "Tells it.", "input_schema": PARAMETERS}
    asked = MESSAGE | {"tools": [tool], "tool_choice": choice, "max_tokens": 80}
    if stream:
        with served.anthropic().messages.stream(**asked) as events:
            answer = events.get_final_message()
    else:
        answer = served.anthropic().messages.create(**asked)
    (used,) = [block for block in answer.content if block.type == "tool_use"]
    assert used.name == "weather" and answer.stop_reason == "tool_use"
    check_weather(json.dumps(used.input))


def test_errors_are_those_of_each_sdk(served: Served) -> None:
    client = served.anthropic()
    with pytest.raises(anthropic.NotFoundError, match="Did you mean 'tiny'"):
        client.messages.create(**MESSAGE | {"model": "tinny"})
    with pytest.raises(anthropic.BadRequestError) as long:
        client.messages.create(**MESSAGE | {"messages": [{"role": "user", "content": "cat " * (MAX_LENGTH + 44)}]})
    assert long.value.type == "invalid_request_error" and str(MAX_LENGTH) in str(long.value)
    for wrong in ({"max_tokens": -1}, {"messages": []}, {"tool_choice": {"type": "zzz"}}):
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**MESSAGE | wrong)
        assert set(refused.value.body) == {"type", "error", "request_id"}
    with pytest.raises(openai.BadRequestError):
        served.client().responses.create(model="tiny", input="cat " * (MAX_LENGTH + 44))
    with pytest.raises(openai.BadRequestError, match="served to embed"):
        served.client().embeddings.create(model="tiny", input=ASK)


def test_errors_name_the_field_and_nothing_of_the_server(served: Served) -> None:
    def refused(path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{served.url}/v1/{path}", json={"model": "tiny", **body}, timeout=60)
        assert answer.status_code == 400, answer.text
        return dict(answer.json()["error"])

    error = refused("completions", prompt=ASK, max_tokens="x")
    assert error["message"] == "`max_tokens` is 'x'; it must be a whole number from 0 to 2^64-1."
    assert error["param"] == "max_tokens"
    many = refused("completions", prompt=ASK, n=20_000)["message"]
    assert "at most" in many and "VLLM_" not in many
    for path in ("chat/completions", "messages"):
        said = refused(path, messages=[{"role": "user", "content": ASK}], max_tokens=[], temperature="hot")["message"]
        assert (
            "`temperature` is 'hot'; it must be a number from 0 to 2." in said and "`max_tokens` is an array;" in said
        )


def test_what_vllm_would_fail_on_is_the_clients_error(served: Served) -> None:
    recursive = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}}
    for wrong in ({"structured_outputs": "x"}, {"top_k": 1e30}, {"response_format": recursive}):
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=GREEDY | wrong, timeout=60)
        assert answer.status_code == 400 and f"`{next(iter(wrong))}" in answer.json()["error"]["message"], answer.text


def test_null_fields_of_responses_are_as_if_absent(served: Served) -> None:
    nulls = dict.fromkeys(
        ("background", "service_tier", "tools", "tool_choice", "truncation", "text", "stop", "metadata")
    )
    body = {"model": "tiny", "input": ASK, "max_output_tokens": 16, **nulls}
    answer = httpx.post(f"{served.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_a_refused_message_leaves_no_traceback_in_the_log(served: Served, cluster: LocalCluster) -> None:
    with pytest.raises(anthropic.BadRequestError):
        served.anthropic().messages.create(**MESSAGE | {"messages": [{"role": "user", "content": "cat " * 3000}]})
    logs = cluster.folder / "ray" / "session_latest" / "logs"
    texts = [path.read_text(errors="replace") for path in logs.glob("worker-*")]
    assert texts and not [text for text in texts if "Error in create_messages" in text]


def test_text_becomes_tokens_and_text_again(served: Served) -> None:
    with httpx.Client(base_url=served.url, timeout=60) as http:
        made = http.post("/tokenize", json={"model": "red", "prompt": ASK}).json()
        assert made["count"] == len(made["tokens"]) and made["max_model_len"] == MAX_LENGTH
        back = http.post("/detokenize", json={"model": "red", "tokens": made["tokens"]}).json()
        assert back["prompt"] == ASK
        chat = http.post("/tokenize", json={"model": "tiny", "messages": TALK}).json()
        assert chat["count"] > made["count"]


def test_an_answer_tells_what_the_gateway_added(served: Served) -> None:
    answer = served.client().chat.completions.with_raw_response.create(**GREEDY)
    assert re.fullmatch(r"gateway;dur=\d+\.\d{3}, engine;dur=\d+\.\d{3}", answer.headers["server-timing"])


EXAMPLES = [
    block for page in ("README.md", "docs/guides/clients.md") for block in python_blocks(page) if "my-adapter" in block
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_python_examples_of_the_documentation_run_as_written(served: Served, number: int) -> None:
    exec(EXAMPLES[number].replace("http://127.0.0.1:8000", served.url).replace("my-adapter", "red"), {})


def test_a_response_has_its_request_id_once_under_each_sdks_header(served: Served) -> None:
    for path, body in (
        ("messages", {"model": "tiny", "messages": TALK, "max_tokens": 2}),
        ("chat/completions", {"model": "tiny", "messages": TALK, "max_tokens": 2}),
        ("messages", {"model": "tiny", "messages": TALK}),
        ("chat/completions", {"model": "nobody", "messages": TALK}),
    ):
        answer = httpx.post(f"{served.url}/v1/{path}", json=body, timeout=60)
        ids = sorted((name, value) for name, value in answer.headers.multi_items() if name.endswith("request-id"))
        assert [name for name, _ in ids] == ["request-id", "x-request-id"], (path, answer.status_code, ids)
        assert ids[0][1] == ids[1][1]
    with pytest.raises(openai.BadRequestError, match="`messages` is missing or null"):
        served.client().post("/chat/completions", body={"model": "tiny", "messages": None}, cast_to=object)
