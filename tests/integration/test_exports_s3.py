"""Results of training jobs in an object store: a real S3 server (moto) through s3fs."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from small_folders import small_adapter, small_model

from tandem.config import DataConfig, TrainConfig
from tandem.config.training.model import LoraConfig, ModelConfig
from tandem.errors import ConfigError, StorageError
from tandem.registry import BaseRef, Registry, find_base, local_folder
from tandem.registry.model_cache import ModelCache, describe
from tandem.storage import file_system
from tandem.train.registration import Origin, register_result

ADAPTED = ModelConfig(base="base")


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    """The URI of a bucket of this module's own."""
    file_system("s3://exports").mkdir("exports")
    return "s3://exports"


@pytest.fixture
def config(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainConfig:
    """A job whose result is copied to a place of this test's own."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    return TrainConfig(name="result", data=DataConfig(path="x"), export_to=f"{bucket}/{uuid.uuid4().hex}/")


def origin(base: BaseRef | None = None) -> Origin:
    return Origin(base=base, dataset="a digest")


def test_a_trained_model_is_copied_and_can_be_served_from_the_store(config: TrainConfig, tmp_path: Path) -> None:
    job = tmp_path / "job-1"
    small_model(job / "export")
    result = register_result(config, job, origin(), loss=1.0, evaluation=None)
    record = Registry.open().resolve("result")
    copy = f"{str(config.export_to).rstrip('/')}/job-1"
    assert (result.path, record.path) == (str(job / "export"), job / "export") and record.lineage["copy"] == copy
    fetched = ModelCache.open().fetch(describe(copy))
    for file in (job / "export").iterdir():
        assert (fetched / file.name).read_bytes() == file.read_bytes()
    # A job that is submitted again copies and registers the same.
    assert register_result(config, job, origin(), loss=1.0, evaluation=None) == result


def test_an_adapter_is_registered_from_its_copy_and_needs_the_job_no_more(config: TrainConfig, tmp_path: Path) -> None:
    Registry.open().register_model("base", small_model(tmp_path / "base"))
    job = tmp_path / "job-2"
    weights = small_adapter(job / "export").joinpath("adapter_model.safetensors").read_bytes()
    adapted = replace(config, model=ADAPTED, lora=LoraConfig())
    result = register_result(adapted, job, origin(find_base("base")), loss=1.0, evaluation=None)
    assert result.path == f"{str(config.export_to).rstrip('/')}/job-2" and result.base == "base@1"
    (job / "export").rename(tmp_path / "moved")
    record = Registry.open().resolve("result")
    assert (local_folder(record) / "adapter_model.safetensors").read_bytes() == weights


def test_a_copy_that_was_cut_is_taken_for_no_model(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, store = tmp_path / "job-3", file_system("s3://exports")
    small_model(job / "export")
    register_result(config, job, origin(), loss=1.0, evaluation=None)
    copy = f"{str(config.export_to).rstrip('/')}/job-3"

    def fail(*_: object, **__: object) -> None:
        raise OSError("the connection was closed")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", fail)
        with pytest.raises(StorageError, match=f"{copy} cannot be written: .*the connection was closed"):
            register_result(config, job, origin(), loss=1.0, evaluation=None)
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        describe(copy)


def test_a_relative_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="export_to is 'models', which is relative"):
        TrainConfig(name="result", data=DataConfig(path="x"), export_to="models")
