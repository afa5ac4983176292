"""The end of a job says where the model is and what to type next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.jobs.folder import JobFolder
from tandem.observability.events import Finished
from tandem.sdk import summary
from tandem.sdk.summary import RunningApp, commands, result_figures, unserved_reason

END = Finished(
    model="helper@3",
    loss=2.1414,
    tokens=696_320,
    seconds=248.2,
    evaluation={"step": 300, "loss": 2.25, "perplexity": 9.4877},
)


def test_numbers_are_said_as_far_as_they_are_known():
    assert result_figures(END) == "loss 2.141, evaluation 2.250 (perplexity 9.488), 696,320 tokens, 4:08 min"
    assert result_figures(Finished(loss=1.0, seconds=3)) == "loss 1.000, 3 s"
    assert result_figures(Finished()) == ""


def test_a_model_is_served_by_its_own_name_and_an_adapter_by_its_bases():
    assert commands(END) == [("serve it", "tandem serve up helper"), ("ask it", "tandem chat --model helper")]
    assert commands(replace(END, base="base@2"))[0] == ("serve it", "tandem serve up base@2")
    assert commands(replace(END, model=None)) == []


def test_a_dora_adapter_is_merged_first():
    told = dict(commands(replace(END, base="base@2", dora=True)))
    assert told["merge it"] == "tandem models merge helper helper-merged"
    assert told["serve it"] == "tandem serve up helper-merged"


def test_an_app_that_is_up_is_changed_and_not_started_again():
    app = RunningApp(url="http://127.0.0.1:8000/v1", models=("other", "helper"), answers=False)
    assert commands(END, app)[0] == ("serve it", "tandem serve deploy other helper")
    assert commands(replace(END, base="base@2"), app)[0] == ("serve it", "tandem serve deploy other helper base@2")
    (only,) = commands(END, RunningApp(url=app.url, models=("helper",), answers=True))
    assert only == ("http://127.0.0.1:8000/v1 answers for it already; ask it", "tandem chat --model helper")


def test_a_shape_that_the_engine_cannot_serve_on_cpus_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = JobFolder(tmp_path)
    job.export.mkdir()

    def write(head_dim: int) -> None:
        config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4 * head_dim, "num_attention_heads": 4}
        (job.export / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(summary, "gpus", list)
    write(16)
    assert "attention heads have 16 dimensions" in str(unserved_reason(job, END))
    write(32)
    assert unserved_reason(job, END) is None
    write(16)
    monkeypatch.setattr(summary, "gpus", lambda: ["a GPU"])
    assert unserved_reason(job, END) is None
