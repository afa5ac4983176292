"""Checks of the driver before workers start, and its exit after a stop request."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.config import DataConfig, DpoConfig, LoraConfig, ModelConfig, ParallelismConfig, TrainConfig
from tandem.data.tokenize import TextEncoder, train_tokenizer
from tandem.errors import ClusterError, ConfigError
from tandem.registry import BaseRef
from tandem.train import launch
from tandem.train.launch import check_capacity, find_reference_model


def config(**parallel: float) -> TrainConfig:
    return TrainConfig(name="a", data=DataConfig(path="x"), parallel=ParallelismConfig(**parallel), batch_size=24)


def test_workers_that_the_whole_cluster_cannot_hold_are_refused_with_the_numbers():
    with pytest.raises(
        ClusterError, match=r"3 workers of 1 CPU each, and 0.25 to read the data need 3.25 CPU; .* has 3"
    ):
        check_capacity(config(workers=3), {"CPU": 3.0})
    with pytest.raises(ClusterError, match="2 GPU; the whole cluster has 0"):
        check_capacity(config(workers=2, gpus_per_worker=1), {"CPU": 8.0})


def test_workers_that_fit_are_accepted():
    check_capacity(config(workers=3), {"CPU": 4.0})
    check_capacity(config(workers=2, gpus_per_worker=1), {"CPU": 8.0, "GPU": 2.0})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base`, `alike` and `other`: the last with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, text in (("base", "some words"), ("alike", "some words"), ("other", "different letters entirely")):
        train_tokenizer([text] * 5, folder / name, vocab_size=270)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(b"x")
    return folder


def reference_of(models: Path, reference: str | None, *, lora: bool = False, objective: str = "dpo") -> Path | None:
    base = BaseRef(id="base@1", path=models / "base", max_length=None, record=None)
    dpo = objective == "dpo"
    job = TrainConfig(
        name="a", data=DataConfig(path="x"), model=ModelConfig(base="base"), objective=objective,
        lora=LoraConfig(rank=4) if lora else None,
        dpo=DpoConfig(reference=str(models / reference) if reference else None) if dpo else None,
    )  # fmt: skip
    return find_reference_model(job, base, TextEncoder(str(models / "base")))


def test_the_dpo_reference_is_the_base_or_the_named_model(models: Path):
    assert reference_of(models, None) == models / "base"
    assert reference_of(models, "alike") == models / "alike"
    assert reference_of(models, "alike", lora=True) == models / "alike"


def test_adapters_need_no_second_model_as_reference(models: Path):
    assert reference_of(models, None, lora=True) is None
    assert reference_of(models, None, objective="next_token") is None


def test_a_reference_with_another_tokenizer_is_refused_with_the_numbers(models: Path):
    with pytest.raises(ConfigError, match=r"another tokenizer than model\.base \(base@1\): \d+ tokens, of which \d+"):
        reference_of(models, "other")


@pytest.fixture
def own_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_driver_stopped_before_it_has_workers_exits_as_a_stopped_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_sigterm: None
):
    def told_to_stop(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except SystemExit:
            # As Ray does to it, where it waits.
            sys.exit(1)

    monkeypatch.setattr(launch, "run_job", told_to_stop)
    assert launch.main([str(tmp_path)]) == 143
    told = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert told == ["stopped"]
    # Whoever leaves by itself, without having been told to, is not a job that was stopped.
    monkeypatch.setattr(launch, "run_job", lambda *_: sys.exit(1))
    with pytest.raises(SystemExit):
        launch.main([str(tmp_path)])
