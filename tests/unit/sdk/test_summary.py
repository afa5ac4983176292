"""The end of a job says where the model is and what to type next."""

from __future__ import annotations

from tandem.sdk.summary import commands, result_figures

END = {
    "event": "finished", "model": "helper@3", "base": None, "loss": 2.1414, "tokens": 696_320, "seconds": 248.2,
    "evaluation": {"step": 300, "loss": 2.25, "perplexity": 9.4877},
}  # fmt: skip


def test_numbers_are_said_as_far_as_they_are_known():
    assert result_figures(END) == "loss 2.141, evaluation 2.250 (perplexity 9.488), 696,320 tokens, 4:08 min"
    assert result_figures({"loss": 1.0, "evaluation": None, "seconds": 3}) == "loss 1.000, 3 s"
    assert result_figures({}) == ""


def test_a_model_is_served_by_its_own_name_and_an_adapter_by_its_bases():
    assert commands(END) == [("serve it", "tandem serve up helper"), ("ask it", "tandem chat --model helper")]
    assert commands({**END, "base": "base@2"})[0] == ("serve it", "tandem serve up base@2")
    assert commands({**END, "model": None}) == []


def test_a_dora_adapter_is_merged_first():
    told = dict(commands({**END, "base": "base@2", "dora": True}))
    assert told["merge it"] == "tandem models merge helper helper-merged"
    assert told["serve it"] == "tandem serve up helper-merged"
