"""Stored responses and chat completions through the `openai` SDK: real HTTP, an echo engine, a real database."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from gateway_world import World, echo, running

from tandem.auth import KeyStore, Role
from tandem.config import GatewayConfig, StoredConfig
from tandem.gateway.stored import service as service_module
from tandem.gateway.stored.service import StoredAnswerService
from tandem.registry import Registry
from tandem.stored.content import pack
from tandem.stored.records import AnswerKind, NewAnswer
from tandem.stored.store import StoredAnswers

MESSAGES: list[Any] = [{"role": "system", "content": "be short"}, {"role": "user", "content": "one two"}]


@dataclass
class Stored:
    """A gateway with an echo engine, and clients of two tenants."""

    world: World
    lab: openai.AsyncOpenAI
    other: openai.AsyncOpenAI
    store: StoredAnswers

    async def written(self) -> None:
        """Wait until nothing is under way."""
        recorder = self.world.app.state.stored.recorder
        async with asyncio.timeout(20):
            while recorder.is_recording("lab") or recorder.is_recording("other"):
                await asyncio.sleep(0.01)

    async def page(self) -> list[str]:
        return [each.id async for each in self.lab.chat.completions.list()]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are waited for however busy the machine is."""
    monkeypatch.setattr(service_module, "RECENT_S", 30.0)


@contextlib.asynccontextmanager
async def stored_world(tmp_path: Path, engine: Any = None, **config: Any) -> AsyncIterator[Stored]:
    keys = KeyStore.at(Registry(f"sqlite:///{tmp_path}/tandem.db").address)
    secrets = [
        keys.create(name, tenant=tenant, role=Role.USER, by="test").secret
        for name, tenant in (("a", "lab"), ("b", "other"))
    ]
    async with running(tmp_path, stored=StoredConfig(**config)) as world, contextlib.AsyncExitStack() as stack:
        await world.add_engine(engine or echo())
        clients = [
            await stack.enter_async_context(
                openai.AsyncOpenAI(base_url=f"{world.http.base_url}/v1", api_key=secret, max_retries=3)
            )
            for secret in secrets
        ]
        deadline = time.monotonic() + 20
        for client in clients:
            while True:
                with contextlib.suppress(openai.APIStatusError):
                    await client.models.list()
                    break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        store = StoredAnswers.at(world.registry.address)
        yield Stored(world, *clients, store=store)
        store.close()


@pytest.fixture
async def stored(tmp_path: Path) -> AsyncIterator[Stored]:
    async with stored_world(tmp_path) as found:
        yield found


async def test_a_stored_response_is_retrieved_as_it_was_answered_and_deleted(stored: Stored) -> None:
    made = await stored.lab.responses.create(model="base", input="one two", store=True, metadata={"k": "v"})
    assert made.output_text == "one two"
    assert await stored.lab.responses.retrieve(made.id) == made
    items = (await stored.lab.responses.input_items.list(made.id)).data
    assert [(item.type, item.role, item.content[0].text) for item in items] == [("message", "user", "one two")]  # type: ignore[union-attr]
    await stored.lab.responses.delete(made.id)
    for call in (stored.lab.responses.retrieve, stored.lab.responses.delete, stored.lab.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="not found"):
            await call(made.id)
    assert stored.store.used_bytes("lab") == 0, "the content is gone"


async def test_nothing_is_stored_unless_asked_for_or_the_config_says_so(stored: Stored, tmp_path: Path) -> None:
    for asked in ({}, {"store": False}):
        made = await stored.lab.responses.create(model="base", input="one", **asked)  # type: ignore[call-overload]
        with pytest.raises(openai.NotFoundError):
            await stored.lab.responses.retrieve(made.id)
    async with stored_world(tmp_path / "default", default=True) as always:
        made = await always.lab.responses.create(model="base", input="one")
        assert (await always.lab.responses.retrieve(made.id)).id == made.id
        made = await always.lab.responses.create(model="base", input="one", store=False)
        with pytest.raises(openai.NotFoundError):
            await always.lab.responses.retrieve(made.id)


async def test_a_request_sent_again_with_its_idempotency_key_gets_the_stored_answer(stored: Stored) -> None:
    headers = {"Idempotency-Key": "once"}

    async def ask(client: openai.AsyncOpenAI, text: str = "one two", **options: Any) -> Any:
        chat = client.chat.completions.with_raw_response
        messages = [{"role": "user", "content": text}]
        return await chat.create(model="base", messages=messages, extra_headers=headers, **{"store": True, **options})

    first, again = await ask(stored.lab), await ask(stored.lab)
    assert again.parse() == first.parse()
    assert (first.headers.get("idempotent-replayed"), again.headers["idempotent-replayed"]) == (None, "true")
    assert await stored.page() == [first.parse().id]
    with pytest.raises(openai.ConflictError, match=f"with another request, whose answer is {first.parse().id}"):
        await ask(stored.lab, "three")
    # The key counts for one caller, one path, and answers that are stored.
    response = await stored.lab.responses.create(model="base", input="one two", store=True, extra_headers=headers)
    assert response.output_text == "one two"
    for fresh in (await ask(stored.other), await ask(stored.lab, "three", store=False)):
        assert "idempotent-replayed" not in fresh.headers
    # Without one, each request is stored.
    del headers["Idempotency-Key"]
    await ask(stored.lab)
    await stored.written()
    assert len(await stored.page()) == 2


async def test_a_stream_sent_again_with_its_idempotency_key_is_stored_once(stored: Stored) -> None:
    ids = []
    for _ in range(2):
        stream = await stored.lab.responses.create(
            model="base", input="one two", store=True, stream=True, extra_headers={"Idempotency-Key": "once"}
        )
        ids.append([event.response.id async for event in stream if event.type == "response.completed"])
        await stored.written()
    assert ids[0] != ids[1]
    assert (await stored.lab.responses.retrieve(ids[1][0])).output_text == "one two"
    with pytest.raises(openai.NotFoundError):
        await stored.lab.responses.retrieve(ids[0][0])


async def test_a_streamed_response_is_stored_whole_and_its_client_sees_every_event(stored: Stored) -> None:
    events = [
        event
        async for event in await stored.lab.responses.create(model="base", input="one two", store=True, stream=True)
    ]
    assert [event.type for event in events].count("response.output_text.delta") == 2
    final = events[-1].response  # type: ignore[union-attr]
    assert await stored.lab.responses.retrieve(final.id) == final


async def test_a_conversation_goes_on_from_stored_responses(stored: Stored) -> None:
    first = await stored.lab.responses.create(model="base", input="one", store=True)
    second = await stored.lab.responses.create(
        model="base", input=[{"role": "user", "content": "two"}], previous_response_id=first.id, store=True
    )
    # The echo engine repeats the conversation that it is sent.
    assert second.output_text == "one one two"
    third = await stored.lab.responses.create(
        model="base", input="three", previous_response_id=second.id, instructions="say"
    )
    assert third.output_text == "say one one two one one two three"
    kept = await stored.lab.responses.retrieve(second.id)
    assert kept.previous_response_id == first.id
    items = (await stored.lab.responses.input_items.list(second.id)).data
    assert [item.content[0].text for item in items] == ["two"], "a response keeps its own input alone"  # type: ignore[union-attr]
    # Usage counts the conversation: it was read by the engine.
    assert third.usage is not None and third.usage.input_tokens == 8


async def test_a_conversation_whose_beginning_is_deleted_or_of_another_tenant_is_400(stored: Stored) -> None:
    first = await stored.lab.responses.create(model="base", input="one", store=True)
    second = await stored.lab.responses.create(model="base", input="two", previous_response_id=first.id, store=True)
    await stored.written()
    await stored.lab.responses.delete(first.id)
    for client, previous, missing in (
        (stored.lab, second.id, first.id), (stored.other, second.id, second.id), (stored.lab, "resp_1", "resp_1"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=f"'{missing}' not found") as refused:
            await client.responses.create(model="base", input="x", previous_response_id=previous)
        assert (refused.value.code, refused.value.param) == ("previous_response_not_found", "previous_response_id")


async def test_a_conversation_that_is_too_long_is_400(tmp_path: Path) -> None:
    async with stored_world(tmp_path, max_turns=2) as stored:
        previous = (await stored.lab.responses.create(model="base", input="a", store=True)).id
        for _ in range(2):
            made = await stored.lab.responses.create(model="base", input="b", previous_response_id=previous, store=True)
            previous = made.id
        with pytest.raises(openai.BadRequestError, match="at most 2") as refused:
            await stored.lab.responses.create(model="base", input="c", previous_response_id=previous)
        assert refused.value.code == "conversation_too_long"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stored_chat_completion_is_kept_with_its_messages(stored: Stored, stream: bool) -> None:
    options: Any = {"model": "base", "messages": MESSAGES, "store": True, "metadata": {"run": "1"}}
    if stream:
        chunks = [chunk async for chunk in await stored.lab.chat.completions.create(**options, stream=True)]
        made_id, text = chunks[0].id, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        made = await stored.lab.chat.completions.create(**options)
        made_id, text = made.id, made.choices[0].message.content
    kept = await stored.lab.chat.completions.retrieve(made_id)
    assert (kept.object, kept.metadata) == ("chat.completion", {"run": "1"})  # type: ignore[attr-defined]
    assert kept.choices[0].message.content == text == "be short one two"
    assert (kept.choices[0].finish_reason, kept.choices[0].message.role) == ("stop", "assistant")
    messages = (await stored.lab.chat.completions.messages.list(made_id)).data
    assert [(each.role, each.content) for each in messages] == [("system", "be short"), ("user", "one two")]
    changed = await stored.lab.chat.completions.update(made_id, metadata={"run": "2"})
    assert changed.metadata == {"run": "2"}  # type: ignore[attr-defined]
    assert (await stored.lab.chat.completions.delete(made_id)).deleted
    with pytest.raises(openai.NotFoundError):
        await stored.lab.chat.completions.retrieve(made_id)


async def test_lists_of_chat_completions_have_filters_and_pages(stored: Stored) -> None:
    made = []
    for number in range(5):
        done = await stored.lab.chat.completions.create(
            model="base", messages=MESSAGES, store=True, metadata={"parity": "odd" if number % 2 else "even"}
        )
        made.append(done.id)
    await stored.other.chat.completions.create(model="base", messages=MESSAGES, store=True)
    assert await stored.page() == made
    listing = stored.lab.chat.completions.list
    assert [each.id async for each in listing(limit=2, order="desc")] == made[::-1]
    assert [each.id async for each in listing(metadata={"parity": "odd"})] == made[1::2]
    assert len((await listing(model="base")).data) == 5 and (await listing(model="red")).data == []
    for wrong in ({"order": "up"}, {"after": "nobody"}, {"metadata": {'a"b': "1"}}):
        with pytest.raises(openai.BadRequestError):
            await listing(**wrong)  # type: ignore[arg-type]


async def test_an_answer_of_another_tenant_does_not_exist(stored: Stored) -> None:
    response = (await stored.lab.responses.create(model="base", input="one", store=True)).id
    chat = (await stored.lab.chat.completions.create(model="base", messages=MESSAGES, store=True)).id
    await stored.written()
    of_other: list[Any] = [
        stored.other.responses.retrieve(response),
        stored.other.responses.delete(response),
        stored.other.responses.input_items.list(response),
        stored.other.chat.completions.retrieve(chat),
        stored.other.chat.completions.update(chat, metadata={}),
        stored.other.chat.completions.delete(chat),
        stored.other.chat.completions.messages.list(chat),
    ]
    for call in of_other:
        with pytest.raises(openai.NotFoundError):
            await call
    assert await stored.page() == [chat] and (await stored.lab.responses.retrieve(response)).id == response


async def test_an_answer_too_large_to_be_stored_is_still_answered(tmp_path: Path) -> None:
    async with stored_world(tmp_path, max_bytes=200, max_pending_bytes=200) as stored:
        raw = await stored.lab.responses.with_raw_response.create(model="base", input="one", store=True)
        made = raw.parse()
        assert made.output_text == "one", "it becomes too large with the answer, which is on its way by then"
        await stored.written()
        recorder = stored.world.app.state.stored.recorder
        assert recorder.lost["too_large"] == 1
        large = await stored.lab.responses.with_raw_response.create(model="base", input="one " * 60, store=True)
        assert "the answer is not stored: request and answer exceed" in large.headers["x-tandem-warning"]
        with pytest.raises(openai.NotFoundError):
            await stored.lab.responses.retrieve(made.id)


async def test_answers_beyond_a_tenants_quota_are_counted_as_lost(tmp_path: Path) -> None:
    async with stored_world(tmp_path, tenant_bytes=10) as stored:
        assert (await stored.lab.responses.create(model="base", input="one", store=True)).output_text == "one"
        await stored.written()
        assert stored.world.app.state.stored.recorder.lost["tenant_full"] == 1


async def test_an_answer_whose_client_left_is_not_stored(tmp_path: Path) -> None:
    async with stored_world(tmp_path, echo(delay_s=0.05)) as stored:
        stream = await stored.lab.responses.create(model="base", input="a " * 100, store=True, stream=True)
        created = await anext(aiter(stream))
        await stream.close()
        await stored.written()
        kept = stored.store.get("lab", AnswerKind.RESPONSE, created.response.id)  # type: ignore[union-attr]
        assert kept is None and stored.world.app.state.stored.recorder.lost.total() == 0


async def test_an_answer_that_another_gateway_is_writing_is_waited_for(tmp_path: Path) -> None:
    address = Registry(f"sqlite:///{tmp_path}/tandem.db").address
    service = StoredAnswerService(address, GatewayConfig(replicas=2))
    raw_bytes, content = pack(b'{"input":"x"}', b'{"id":"r1"}')
    new = NewAnswer(
        id="r1", tenant="lab", kind=AnswerKind.RESPONSE, key_id="", model="base", answered_model="base",
        raw_bytes=raw_bytes, content=content, lifetime_days=1,
    )  # fmt: skip
    looking = asyncio.create_task(service.find("lab", AnswerKind.RESPONSE, "r1"))
    await asyncio.sleep(0.1)
    assert not looking.done()
    with StoredAnswers.at(address) as other:
        await asyncio.to_thread(other.add, new, tenant_bytes=10**6)
    found = await looking
    assert found is not None and found.request == {"input": "x"}
    service.close()


async def test_invalid_values_are_400_before_an_engine_is_asked(stored: Stored) -> None:
    for wrong, param in (
        ({"store": "yes"}, "store"),
        ({"store": True, "metadata": {"k": "v" * 513}}, "metadata"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"background": True}, "background"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await stored.lab.responses.create(model="base", input="x", extra_body=wrong)
        assert refused.value.param == param


async def test_contents_are_in_no_log(stored: Stored, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = await stored.lab.responses.create(model="base", input="very secret words", store=True)
    await stored.lab.responses.retrieve(made.id)
    await stored.written()
    path = tmp_path / "logs" / "access.jsonl"
    async with asyncio.timeout(20):
        while not path.exists() or (log := path.read_text()).count("/v1/responses") < 2:
            await asyncio.sleep(0.05)
    assert "secret" not in log + caplog.text and made.id not in log
