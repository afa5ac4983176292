"""A fine-tuning job's files become datasets and a training config, or an error that names file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_folders import small_model

from tandem.config import TrainConfig, load_yaml
from tandem.data.index import find_dataset
from tandem.data.tokenize import train_tokenizer
from tandem.errors import DataError
from tandem.jobs.fine_tuning import FineTuningFolder, FineTuningSpec, Hyperparameters
from tandem.jobs.fine_tuning.driver import main, prepare
from tandem.observability.events import Failed, FineTuningPlanned
from tandem.observability.journal import Journal
from tandem.registry import Registry


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def preference(question: str) -> dict[str, Any]:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    turns = {"messages": [{"role": "user", "content": question}]}
    return {"input": turns, "preferred_output": said("Yes."), "non_preferred_output": said("No idea at all.")}


@pytest.fixture
def spec(tandem_home: Path, tmp_path: Path) -> FineTuningSpec:
    """A job on 20 chats of a registered base."""
    folder = small_model(tmp_path / "base")
    train_tokenizer([f"What is {n}? It is {n}." for n in range(50)], folder, vocab_size=300)
    base = Registry.open().register_model("base", folder)
    return FineTuningSpec(
        id="ftjob-1",
        model="base",
        base=base.id,
        result="ft:base:default::1",
        training_file="file-1",
        training_location=write(tmp_path / "chats", [chat(f"What is {n}?", f"It is {n}.") for n in range(20)]),
    )


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def prepared(spec: FineTuningSpec) -> tuple[TrainConfig, FineTuningPlanned]:
    folder = FineTuningFolder.create(spec)
    assert folder.spec() == spec
    journal = Journal(folder.path / "events.jsonl")
    prepare(folder.path, spec, journal)
    (planned,) = journal.read()
    assert isinstance(planned, FineTuningPlanned)
    return load_yaml(TrainConfig, folder.path / "config.yaml"), planned


def test_chats_become_an_adapter_job_with_automatic_hyperparameters(spec: FineTuningSpec) -> None:
    config, planned = prepared(spec)
    assert (config.name, config.model.base, config.objective) == ("ft:base:default::1", "base@1", "next_token")
    assert config.lora is not None and config.checkpoint.exports == 3 and config.evaluation is None
    assert (planned.examples, planned.n_epochs, planned.batch_size) == (20, 5, 1)
    assert config.steps == planned.steps and 64 <= config.data.sequence_length <= 512
    assert config.checkpoint.every_steps * planned.n_epochs >= config.steps


def test_a_validation_file_is_evaluated_on_after_each_epoch(spec: FineTuningSpec, tmp_path: Path) -> None:
    location = write(tmp_path / "more", [chat("What is 7?", "It is 7.")])
    config, _ = prepared(replace(spec, validation_file="file-2", validation_location=location))
    assert config.evaluation is not None and config.evaluation.every_steps == config.checkpoint.every_steps
    assert find_dataset(str(config.evaluation.data)).index.samples == 1


def test_preferences_are_trained_by_dpo(spec: FineTuningSpec, tmp_path: Path) -> None:
    location = write(tmp_path / "preferences", [preference(f"Is it {n}?") for n in range(30)])
    hyperparameters = Hyperparameters(beta=0.3, n_epochs=2)
    config, planned = prepared(replace(spec, training_location=location, method="dpo", hyperparameters=hyperparameters))
    assert config.objective == "dpo" and config.dpo is not None and config.dpo.beta == 0.3
    assert (planned.n_epochs, planned.beta) == (2, 0.3)


@pytest.mark.parametrize(
    ("lines", "method", "message"),
    [
        ([chat("a", "b"), {"messages": []}], "supervised", "file-1 line 2: 'messages' is empty"),
        ([preference("a")], "supervised", "file-1 holds preferences, and the method is supervised"),
        ([chat("a", "b")], "dpo", "file-1 holds chats, and the method is dpo"),
        ([chat("a " * 3000, "b")], "supervised", "No example has anything to learn within 512 tokens"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_named_by_its_id(
    spec: FineTuningSpec, tmp_path: Path, lines: list[Any], method: str, message: str
) -> None:
    location = write(tmp_path / "broken", lines)
    with pytest.raises(DataError, match=message):
        prepared(replace(spec, training_location=location, method=method))


def test_a_job_that_cannot_be_prepared_ends_with_the_reason(spec: FineTuningSpec, tmp_path: Path) -> None:
    folder = FineTuningFolder.create(replace(spec, training_location=str(tmp_path / "gone")))
    assert main([str(folder.path)]) != 0
    (event,) = Journal(folder.path / "events.jsonl").read()
    assert isinstance(event, Failed) and "cannot be read" in event.error
