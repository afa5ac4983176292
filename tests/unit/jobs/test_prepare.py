"""An impossible job is refused before it starts; the same submission is the same job."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fake_hub import FakeHub

from tandem.config import (
    DataConfig,
    DpoConfig,
    EvaluationConfig,
    LoraConfig,
    MixturePart,
    ModelConfig,
    ParallelismConfig,
    TrainConfig,
)
from tandem.data.build import build_dataset
from tandem.errors import ConfigError, DataError, LayoutError, RegistryError, StorageError, UnknownModelError
from tandem.jobs import prepare as module
from tandem.jobs.prepare import prepare
from tandem.registry import Registry


def build(home: Path, words: str) -> None:
    source = home / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"{words} {i} " * 30}) + "\n" for i in range(40)))
    build_dataset(str(source), home / "data" / "texts", vocab_size=300, replace=True)


@pytest.fixture
def dataset(tandem_home: Path) -> str:
    build(tandem_home, "a line of text")
    return "texts"


def config(dataset: str, **changes: object) -> TrainConfig:
    return replace(TrainConfig(name="m", data=DataConfig(path=dataset, sequence_length=64)), **changes)  # type: ignore[arg-type]


def a_model(home: Path, positions: int = 128) -> str:
    folder = home / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    (folder / "model.safetensors").write_bytes(b"x")
    return Registry.open().register_model("base", folder).id


def test_the_same_submission_is_the_same_job(dataset: str) -> None:
    first, again = prepare(config(dataset)), prepare(config(dataset))
    assert first == again
    assert first.config().data.path.endswith("/data/texts")


def test_the_same_submission_of_two_tenants_is_two_jobs(dataset: str) -> None:
    jobs = {prepare(config(dataset, name=f"m{tenant}", tenant=tenant)).id for tenant in (None, "red")}
    assert len(jobs) == 2
    assert prepare(config(dataset, tenant="red")) != prepare(config(dataset))


def test_a_name_of_another_tenant_is_refused_before_work_starts(dataset: str, tandem_home: Path) -> None:
    folder = tandem_home / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 128}))
    (folder / "model.safetensors").write_bytes(b"x")
    Registry.open().register_model("m", folder, tenant="blue")
    with pytest.raises(RegistryError, match="The name m belongs to the tenant blue"):
        prepare(config(dataset, tenant="red"))
    prepare(config(dataset, tenant="blue"))
    prepare(config(dataset, tenant="red", register=False))


def test_other_steps_or_other_data_are_another_job_but_more_workers_are_not(dataset: str, tandem_home: Path) -> None:
    first = prepare(config(dataset))
    assert prepare(config(dataset, steps=7)) != first
    assert prepare(config(dataset, parallel=ParallelismConfig(workers=2))) == first
    build(tandem_home, "another line of text")
    assert prepare(config(dataset)) != first


def test_a_dataset_that_does_not_exist_is_refused_with_the_nearest_name(dataset: str) -> None:
    with pytest.raises(DataError, match="Did you mean 'texts'"):
        prepare(config("text"))


def test_a_folder_without_an_index_is_refused_as_a_dataset(tandem_home: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is not a dataset"):
        prepare(config(str(tmp_path / "empty")))


def test_rows_longer_than_the_model_are_refused_with_both_numbers(dataset: str) -> None:
    with pytest.raises(ConfigError, match=r"\(64\).*\(32\)"):
        prepare(config(dataset, model=ModelConfig(max_length=32)))


def test_rows_longer_than_a_registered_base_are_refused(dataset: str, tandem_home: Path) -> None:
    a_model(tandem_home, positions=48)
    with pytest.raises(ConfigError, match=r"\(64\).*\(48\)"):
        prepare(config(dataset, model=ModelConfig(base="base")))


def test_an_impossible_layout_is_refused_before_the_job_exists(dataset: str, tandem_home: Path, tmp_path: Path) -> None:
    four = ParallelismConfig(workers=4, tensor=4)
    with pytest.raises(LayoutError, match="must divide the model's 2 key/value heads"):
        prepare(config(dataset, parallel=four))
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_key_value_heads": 3}))
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(LayoutError, match="must divide the model's 3 key/value heads"):
        prepare(config(dataset, parallel=four, model=ModelConfig(base=str(folder))))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(LayoutError, match="the model is a 'gpt2'"):
        prepare(config(dataset, parallel=four, model=ModelConfig(base=str(folder))))
    assert not list((tandem_home / "jobs").glob("*"))


def test_a_base_is_pinned_to_its_version(dataset: str, tandem_home: Path) -> None:
    a_model(tandem_home)
    job = prepare(config(dataset, model=ModelConfig(base="base"), lora=LoraConfig(rank=8)))
    assert job.config().model.base == "base@1"


def test_an_unknown_base_is_refused_with_the_nearest_name(dataset: str, tandem_home: Path) -> None:
    a_model(tandem_home)
    with pytest.raises(UnknownModelError, match="base"):
        prepare(config(dataset, model=ModelConfig(base="bases")))


def test_loss_on_answers_needs_answers(dataset: str) -> None:
    with pytest.raises(ConfigError, match="plain text without answers"):
        prepare(config(dataset, data=DataConfig(path=dataset, loss_on="answers")))


def preferences(home: Path, name: str, word: str = "bad") -> str:
    source = home / "preferences.jsonl"
    lines = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": word} for i in range(20)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_dataset(str(source), home / "data" / name, tokenizer=home / "data" / "texts" / "tokenizer", replace=True)
    return name


def test_an_objective_is_refused_data_of_another_kind(dataset: str, tandem_home: Path) -> None:
    a_model(tandem_home)
    with pytest.raises(ConfigError, match="holds preferences"):
        prepare(config(preferences(tandem_home, "prefs")))
    with pytest.raises(ConfigError, match="holds text"):
        prepare(config(dataset, objective="dpo", model=ModelConfig(base="base")))
    with pytest.raises(ConfigError, match="prefs holds preferences"):
        prepare(config(dataset, evaluation=EvaluationConfig(data="prefs")))


def mixed(*parts: MixturePart) -> DataConfig:
    return DataConfig(mixture=parts, sequence_length=64)


def test_a_mixture_is_part_of_the_job_by_its_contents_and_weights(dataset: str, tandem_home: Path) -> None:
    shutil.copytree(tandem_home / "data" / "texts", tandem_home / "data" / "copy")
    parts = MixturePart(path="texts", weight=3), MixturePart(path="copy")
    first = prepare(config(dataset, data=mixed(*parts)))
    folders = [str(tandem_home / "data" / name) for name in ("texts", "copy")]
    assert [part.path for part in first.config().data.parts] == folders
    assert [part.weight for part in first.config().data.parts] == [3, 1]
    (tandem_home / "data" / "copy").rename(tandem_home / "data" / "moved")
    moved = parts[0], MixturePart(path="moved")
    assert prepare(config(dataset, data=mixed(*moved))) == first
    assert prepare(config(dataset, data=replace(mixed(*moved), read_ahead=9))) == first
    assert prepare(config(dataset, data=mixed(*moved[::-1]))) != first
    assert prepare(config(dataset, data=mixed(parts[0], MixturePart(path="moved", weight=2)))) != first


def test_an_invalid_mixture_is_refused(dataset: str, tandem_home: Path) -> None:
    texts = MixturePart(path="texts")
    with pytest.raises(DataError, match="names .*/data/texts twice"):
        prepare(config(dataset, data=mixed(texts, MixturePart(path=str(tandem_home / "data" / "texts")))))
    with pytest.raises(ConfigError, match="holds preferences"):
        prepare(config(dataset, data=mixed(texts, MixturePart(path=preferences(tandem_home, "prefs")))))
    build_dataset(str(tandem_home / "texts.jsonl"), tandem_home / "data" / "other", vocab_size=280)
    both = mixed(texts, MixturePart(path="other"))
    with pytest.raises(DataError, match="other has another tokenizer than .*--tokenizer texts"):
        prepare(config(dataset, data=both))
    # A base brings the tokenizer.
    a_model(tandem_home)
    assert prepare(config(dataset, data=both, model=ModelConfig(base="base")))
    with pytest.raises(ConfigError, match="is trained on"):
        prepare(
            config(dataset, data=mixed(texts), evaluation=EvaluationConfig(data=str(tandem_home / "data" / "texts")))
        )


def test_a_reference_is_pinned_and_checked_like_a_base(dataset: str, tandem_home: Path) -> None:
    a_model(tandem_home)
    job = config(preferences(tandem_home, "prefs"), objective="dpo", model=ModelConfig(base="base"))
    assert prepare(replace(job, dpo=DpoConfig(reference="base"))).config().dpo == DpoConfig(reference="base@1")
    with pytest.raises(UnknownModelError, match="dpo.reference"):
        prepare(replace(job, dpo=DpoConfig(reference="bse")))


def test_the_contents_of_the_evaluation_data_are_part_of_the_job(dataset: str, tandem_home: Path) -> None:
    a_model(tandem_home)
    job = config(
        preferences(tandem_home, "prefs"), objective="dpo", model=ModelConfig(base="base"),
        evaluation=EvaluationConfig(data=preferences(tandem_home, "others", "worse")),
    )  # fmt: skip
    first = prepare(job)
    assert first.config().evaluation == EvaluationConfig(data=str(tandem_home / "data" / "others"))
    (tandem_home / "data" / "others").rename(tandem_home / "data" / "moved")
    assert prepare(replace(job, evaluation=EvaluationConfig(data="moved"))) == first
    preferences(tandem_home, "moved", "much worse")
    assert prepare(replace(job, evaluation=EvaluationConfig(data="moved"))) != first


def test_evaluation_on_training_data_is_refused_under_any_name(dataset: str, tandem_home: Path) -> None:
    with pytest.raises(ConfigError, match="is trained on"):
        prepare(config(dataset, evaluation=EvaluationConfig(data=str(tandem_home / "data" / dataset))))


def test_a_full_disk_is_refused_with_the_numbers(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPACE_NEEDED", 2**62)
    with pytest.raises(StorageError, match=r"MiB.*are free"):
        prepare(config(dataset))


def test_a_base_of_the_hub_is_downloaded_and_pinned_at_submission(
    dataset: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"config.json": b'{"max_position_embeddings": 128}', "model.safetensors": b"x"}
    repo = hub.model("org/base", files)
    job = prepare(config(dataset, model=ModelConfig(base="org/base"), lora=LoraConfig(rank=8)))
    assert job.config().model.base == "org/base@1"
    assert prepare(config(dataset, model=ModelConfig(base="org/base@1"), lora=LoraConfig(rank=8))) == job
    repo.commit({**files, "model.safetensors": b"y"})
    assert prepare(config(dataset, model=ModelConfig(base="org/base"), lora=LoraConfig(rank=8))) != job
    with pytest.raises(
        UnknownModelError, match=r"model\.base: There is no folder org/bsae\..*Did you mean 'org/base'\?"
    ):
        prepare(config(dataset, model=ModelConfig(base="org/bsae")))
