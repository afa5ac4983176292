"""Generation for many prompts against an echo engine's own server: real HTTP, no Ray."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from small_folders import small_model
from starlette.requests import Request
from starlette.responses import Response

import tandem
from tandem.engine.echo.engine import EchoEngine
from tandem.errors import ClusterError, ConfigError, PromptError, UnknownModelError
from tandem.registry import Registry
from tandem.sdk.client import RemoteLLM, SamplingParams


class Watched(EchoEngine):
    """Remembers what it was asked, and how many requests were open at once."""

    def __init__(self) -> None:
        super().__init__(delay_s=0.002, max_length=50)
        self.bodies: list[dict[str, Any]] = []
        self.most = 0

    async def _answer(self, request: Request, body: dict[str, Any], prompt: str, *, chat: bool) -> Response:
        self.bodies.append(body)
        self.most = max(self.most, self.stats().running + 1)
        return await super()._answer(request, body, prompt, chat=chat)


@pytest.fixture
def engine() -> Watched:
    return Watched()


def test_answers_come_in_the_order_of_their_prompts(url: str, engine: Watched) -> None:
    llm = RemoteLLM("echo", url, max_concurrency=4)
    prompts = [f"{'long ' * (20 - i)}number {i}" for i in range(20)]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=None), use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == prompts == [output.prompt for output in outputs]
    assert [output["text"] for output in outputs] == prompts
    assert outputs[0].outputs[0].finish_reason == "stop" and outputs[0].finished
    assert 1 < engine.most <= 4


def test_parameters_go_out_by_vllms_names_one_set_for_all_or_one_each(url: str, engine: Watched) -> None:
    llm = RemoteLLM("echo", f"{url}/v1")
    llm.generate(
        "a b", SamplingParams(temperature=0.5, seed=3, stop=["x"], extra={"logit_bias": {"5": 1}}), use_tqdm=False
    )
    said = engine.bodies[-1]
    assert (
        said.items() >= {"temperature": 0.5, "seed": 3, "stop": ["x"], "logit_bias": {"5": 1}, "max_tokens": 16}.items()
    )
    assert said["top_k"] == 0 and said["n"] == 1 and "logprobs" not in said and "extra" not in said
    outputs = llm.generate(["a b c", "a b c"], [SamplingParams(max_tokens=n) for n in (1, 2)], use_tqdm=False)
    assert [output["text"] for output in outputs] == ["a", "a b"]
    with pytest.raises(ConfigError, match="2 prompts and 1 sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()], use_tqdm=False)


def test_a_prompt_may_be_tokens_or_vllms_dictionary_and_alone(url: str, engine: Watched) -> None:
    llm = RemoteLLM("echo", url)
    assert llm.generate([], use_tqdm=False) == []
    for prompt in ([5, 6], [[5, 6]], {"prompt_token_ids": [5, 6]}):
        (output,) = llm.generate(prompt, use_tqdm=False)
        assert engine.bodies[-1]["prompt"] == [5, 6] and output.prompt is None
    assert [output.prompt for output in llm.generate([{"prompt": "a"}, "b"], use_tqdm=False)] == ["a", "b"]
    with pytest.raises(PromptError, match=r"Prompt 1 has neither.*it has text"):
        llm.generate(["a", {"text": "b"}], use_tqdm=False)


def test_chats_are_answered_one_or_many(url: str) -> None:
    llm = RemoteLLM("echo", url)
    one = [{"role": "user", "content": "a b"}]
    assert [output["text"] for output in llm.chat(one, use_tqdm=False)] == ["a b"]
    two = [one, [{"role": "user", "content": "c"}]]
    assert [output["text"] for output in llm.chat(two, use_tqdm=False)] == ["a b", "c"]


def test_a_prompt_that_fails_is_named_by_its_place(url: str) -> None:
    llm = RemoteLLM("echo", url, max_concurrency=2)
    with pytest.raises(
        PromptError, match=r"Prompt 3 of 5 failed: The prompt has 60 tokens; the model takes 50"
    ) as raised:
        llm.generate(["a", "b", "c", "d " * 60, "e"], use_tqdm=False)
    assert raised.value.index == 3
    with pytest.raises(PromptError, match="does not exist"):
        RemoteLLM("nobody", url).generate(["a"], use_tqdm=False)
    with pytest.raises(ConfigError, match="max_concurrency is 0"):
        RemoteLLM("echo", url, max_concurrency=0)


def test_a_server_that_is_not_there_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.sdk.client.RETRIES", 0)
    with pytest.raises(ClusterError, match="leave base_url out"):
        RemoteLLM("echo", "http://127.0.0.1:9").generate(["a"], use_tqdm=False)


def test_it_works_where_a_loop_is_running_and_shows_a_bar(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def in_a_notebook() -> list[Any]:
        return RemoteLLM("echo", url).generate(["a b"] * 3)

    assert len(asyncio.run(in_a_notebook())) == 3
    assert "3/3" in capsys.readouterr().err


def test_settings_of_an_engine_cannot_be_given_to_a_server_that_is_up() -> None:
    with pytest.raises(ConfigError, match="max_model_len cannot change them"):
        tandem.LLM("echo", "http://127.0.0.1:9", max_model_len=64)


def test_a_model_that_nobody_knows_is_refused_when_it_is_named(tandem_home: Path, hub: FakeHub) -> None:
    Registry.open().register_model("quickstart", small_model(tandem_home / "weights"))
    with pytest.raises(
        UnknownModelError, match=r"No model or adapter 'quikstart' is registered\. Did you mean 'quickstart'\?"
    ):
        tandem.LLM("quikstart")
    with pytest.raises(UnknownModelError, match=r"There is no folder org/tiny\. The hub .* has no model org/tiny"):
        tandem.LLM("org/tiny")


def test_importing_it_loads_neither_torch_nor_vllm_nor_ray() -> None:
    code = (
        "import sys, tandem; tandem.LLM, tandem.SamplingParams; "
        "print([m for m in ('torch', 'vllm', 'ray', 'openai', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
