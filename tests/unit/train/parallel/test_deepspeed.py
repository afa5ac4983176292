"""DeepSpeed's options from a job's config, and missing requirements."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tandem.config import DataConfig, DeepSpeedConfig, ParallelismConfig, TrainConfig
from tandem.errors import EnvironmentProblem
from tandem.train.parallel.deepspeed import BUCKET, check_deepspeed, engine_options, offload_folder


def config(**values: Any) -> TrainConfig:
    return TrainConfig(
        name="n", data=DataConfig(path="p"), batch_size=8, accumulate=2,
        parallel=ParallelismConfig(workers=2, strategy="deepspeed"), deepspeed=DeepSpeedConfig(**values),
    )  # fmt: skip


def test_communication_buckets_are_no_larger_than_the_model():
    small = nn.Linear(10, 10)
    options = engine_options(small, config(stage=3), pin=False)
    assert options["zero_optimization"]["reduce_bucket_size"] == 110
    large = nn.Linear(BUCKET // 10, 20, device="meta")
    assert engine_options(large, config(stage=1), pin=False)["zero_optimization"]["allgather_bucket_size"] == BUCKET
    assert options["train_micro_batch_size_per_gpu"] == 2 and options["gradient_accumulation_steps"] == 2


def test_offload_for_a_gpu_uses_pinned_memory():
    model = nn.Linear(10, 10)
    for pin in (True, False):
        zero = engine_options(model, config(offload_optimizer="cpu", offload_parameters="cpu"), pin=pin)
        for key in ("offload_optimizer", "offload_param"):
            assert zero["zero_optimization"][key] == {"device": "cpu", "pin_memory": pin}


def test_each_job_has_its_own_offload_folder(tmp_path: Path):
    to_disk = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    one, other = config(**to_disk), config(**to_disk, offload_parameters="nvme")
    assert offload_folder(one) != offload_folder(other) and offload_folder(one) == offload_folder(config(**to_disk))
    assert offload_folder(config()) is None
    zero = engine_options(nn.Linear(10, 10), other, pin=False)["zero_optimization"]
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == str(offload_folder(other))


def test_a_missing_deepspeed_is_reported_with_the_install_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'tandem\[deepspeed\]'"):
        check_deepspeed(config())
    check_deepspeed(TrainConfig(name="n", data=DataConfig(path="p")))


def test_missing_requirements_of_disk_offload_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    wanted = config(offload_optimizer="nvme", nvme_path=str(tmp_path))
    with pytest.raises(EnvironmentProblem, match=r"Missing here:.*a C\+\+ compiler.*ninja.* set offload_optimizer to"):
        check_deepspeed(wanted)
