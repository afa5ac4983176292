"""What people put on top of the APIs: LangChain, LiteLLM and instructor, as they come."""

from __future__ import annotations

import os
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from serve_fixtures import Pooled, Served

ASK = "the cat sat on"


class Trip(BaseModel):
    """Where to, and for how long."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def greedy(served: Served) -> str:
    """What the model says, by the openai SDK."""
    answer = served.client().chat.completions.create(
        model="red", messages=[{"role": "user", "content": ASK}], temperature=0, max_tokens=16
    )
    return str(answer.choices[0].message.content)


def test_langchain_chats_streams_parses_and_calls_tools(served: Served) -> None:
    from langchain_openai import ChatOpenAI

    settings: dict[str, Any] = {"base_url": f"{served.url}/v1", "api_key": "test", "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(model="red", max_tokens=16, **settings)
    answer = chat.invoke(ASK)
    assert answer.content == greedy(served) and answer.usage_metadata["output_tokens"] <= 16
    assert "".join(chunk.content for chunk in chat.stream(ASK)) == answer.content
    assert [a.content for a in chat.batch([ASK, ASK])] == [answer.content] * 2

    longer = ChatOpenAI(model="tiny", max_tokens=80, **settings)
    assert isinstance(longer.with_structured_output(Trip, method="json_schema").invoke(ASK), Trip)
    called = longer.bind_tools([Trip], tool_choice="Trip").invoke(ASK)
    assert called.tool_calls[0]["name"] == "Trip" and Trip(**called.tool_calls[0]["args"])

    responses = ChatOpenAI(model="red", max_tokens=16, use_responses_api=True, **settings)
    assert responses.invoke(ASK).text == answer.content


def test_instructor_gets_an_object_by_a_tool_call(served: Served) -> None:
    import instructor

    client = instructor.from_openai(served.client(), mode=instructor.Mode.TOOLS)
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": ASK}], "temperature": 0, "max_tokens": 80}
    trip = client.chat.completions.create(model="tiny", response_model=Trip, max_retries=0, **asked)
    assert isinstance(trip, Trip)


def test_langchain_embeds(pooled: Pooled) -> None:
    from langchain_openai import OpenAIEmbeddings

    # Tokens of OpenAI's own models would mean nothing here: LangChain is told to send text.
    embeddings = OpenAIEmbeddings(
        model="embedder", base_url=f"{pooled.url}/v1", api_key="test", check_embedding_ctx_length=False
    )
    direct = pooled.client().embeddings.create(model="embedder", input=ASK).data[0].embedding
    assert embeddings.embed_query(ASK) == pytest.approx(direct, abs=1e-5)
    assert len(embeddings.embed_documents([ASK, "one"])) == 2


def test_litellm_chats_embeds_and_ranks(served: Served, pooled: Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else it fetches a table of prices when it is imported.
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    asked: dict[str, Any] = {"messages": [{"role": "user", "content": ASK}], "max_tokens": 16, "temperature": 0}
    at: dict[str, Any] = {"api_base": f"{served.url}/v1", "api_key": "test", "num_retries": 0}
    expected = greedy(served)
    answer = litellm.completion(model="openai/red", **asked, **at)
    assert answer.choices[0].message.content == expected and answer.usage.completion_tokens <= 16
    chunks = list(litellm.completion(model="hosted_vllm/red", stream=True, **asked, **at))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    message = litellm.completion(model="anthropic/red", **asked, api_base=served.url, api_key="test")
    assert message.choices[0].message.content == expected
    with pytest.raises(litellm.exceptions.NotFoundError):
        litellm.completion(model="openai/nobody", **asked, **at)
    there = {"api_base": f"{pooled.url}/v1", "api_key": "test"}
    made = litellm.embedding(model="openai/embedder", input=[ASK], **there)
    direct = pooled.client().embeddings.create(model="embedder", input=ASK).data[0].embedding
    assert made.data[0]["embedding"] == pytest.approx(direct, abs=1e-5)
    ranked = litellm.rerank(model="hosted_vllm/judge", query=ASK, documents=["one", "two"], **there)
    assert len(ranked.results) == 2
