"""`tandem.LLM` with real engines: on an app that is up, and on one that it starts and leaves no trace of."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
from commands import cluster_mark, gone, started
from serve_fixtures import PROMPTS, Served, greedy_tokens, write_model

import tandem
from tandem.errors import ConfigError, PromptError, UnknownModelError

GREEDY = tandem.SamplingParams(temperature=0, max_tokens=12)


@pytest.mark.parametrize("model", ["tiny", "red"])
def test_its_tokens_are_those_of_hugging_face(served: Served, model: str) -> None:
    llm = tandem.LLM(model, base_url=served.url)
    outputs = llm.generate(list(PROMPTS) * 4, GREEDY, use_tqdm=False)
    expected = [greedy_tokens(served.base, served.adapters.get(model), prompt, 12) for prompt in PROMPTS]
    assert [output["token_ids"] for output in outputs] == expected * 4
    assert [output.prompt for output in outputs] == list(PROMPTS) * 4
    again = llm.generate([output.prompt_token_ids for output in outputs[:3]], GREEDY, use_tqdm=False)
    assert [output["token_ids"] for output in again] == expected


def test_an_app_that_is_up_on_this_homes_cluster_is_found(served: Served) -> None:
    llm = tandem.LLM("red")
    assert llm.base_url == f"{served.url}/v1"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    sampling = tandem.SamplingParams(n=2, seed=3, max_tokens=6, ignore_eos=True, logprobs=1)
    outputs = llm.chat(chats, sampling, use_tqdm=False)
    assert [len(output.outputs) for output in outputs] == [2, 2, 2]
    answer = outputs[0].outputs[1]
    assert len(answer.token_ids) == 6 and answer.finish_reason == "length" and answer.logprobs.content
    assert outputs[0].prompt_token_ids
    with pytest.raises(ConfigError, match="max_model_len cannot change them"):
        tandem.LLM("red", max_model_len=64)
    with pytest.raises(UnknownModelError, match="The model 'redd' does not exist.*Did you mean 'red'"):
        tandem.LLM("redd")
    with pytest.raises(UnknownModelError, match="The model 'org/redd' does not exist"):
        tandem.LLM("org/redd", base_url=served.url)
    with pytest.raises(PromptError, match="Prompt 0 of 1 failed"):
        tandem.LLM("red").generate("x " * 5000, use_tqdm=False)


@pytest.mark.slow  # a vLLM engine of its own
def test_a_model_that_nobody_serves_is_served_for_as_long_as_it_takes(tmp_path: Path) -> None:
    home, model = tmp_path / "home", write_model(tmp_path / "tiny")
    home.mkdir()
    script = textwrap.dedent(
        f"""
        import tandem
        llm = tandem.LLM({str(model)!r}, max_model_len=128)
        print("ANSWER", llm.generate({PROMPTS[0]!r}, tandem.SamplingParams(temperature=0, max_tokens=12))[0]["token_ids"])
        input()
        """
    )
    with started([sys.executable, "-c", script], home=home, log=tmp_path / "log") as running:
        running.wait_for("ANSWER", timeout_s=180)
        mark = cluster_mark(home)
        # stdin is closed: `input` raises, and the program ends without a word of `close`.
        running.process.wait(60)
    assert str(greedy_tokens(model, None, PROMPTS[0], 12)) in running.text()
    assert gone(mark) == []
