"""Two processes under DeepSpeed train like one: every stage and offload, resumed, evaluated and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_world import ZERO
from objectives_world import SHAPE
from worlds import alike, result, run_worlds

from tandem.data.tokenize import TextEncoder
from tandem.train.model import build_model
from tandem.train.objectives.objective import NextToken

STAGES = ("zero 1", "zero 2", "zero 3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one process and two processes gave for every case of deepspeed_world.py."""
    return run_worlds("deepspeed_world.py", tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("zero", ZERO)
def test_every_stage_and_offload_trains_and_evaluates_like_one_process(world: Path, zero: str):
    alone = result(world, 1, "plain")
    # Every step is clipped, to 0.5.
    assert all(step["grad_norm"] > 0.5 for step in alone["steps"])
    alike(result(world, 2, zero), alone, 1e-5)


def test_one_worker_trains_under_deepspeed(world: Path):
    alike(result(world, 1, "zero 3"), result(world, 1, "plain"), 1e-5)


@pytest.mark.parametrize("kind", ["lora", "dpo lora"])
@pytest.mark.parametrize("zero", STAGES)
def test_adapters_train_like_in_one_process(world: Path, kind: str, zero: str):
    alike(result(world, 2, f"{kind} {zero}"), result(world, 1, kind), 1e-5)


def test_dpo_trains_with_a_sharded_reference(world: Path):
    alike(result(world, 2, "dpo zero 3"), result(world, 1, "dpo"), 1e-5)


def test_averages_equal_those_of_one_process(world: Path):
    alike(result(world, 2, "ema zero 2"), result(world, 1, "ema"), 1e-5)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_loss(world: Path, mode: str):
    alike(result(world, 2, f"{mode} zero 3"), result(world, 1, "plain"), 1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
@pytest.mark.parametrize("zero", STAGES)
def test_lower_precision_is_close_to_float32(world: Path, precision: str, tolerance: float, zero: str):
    exact = [step["loss"] for step in result(world, 1, "plain")["steps"]]
    found = result(world, 2, f"{precision} {zero}")["steps"]
    assert [step["loss"] for step in found] == pytest.approx(exact, abs=tolerance)
    assert [step["loss"] for step in found] != pytest.approx(exact, abs=1e-7)
    if precision == "float16":
        assert [step["metrics"]["loss_scale"] for step in found] == [2.0**16] * len(found)


def test_overflowing_steps_are_skipped_and_halve_the_scale(world: Path):
    ranks = [result(world, 2, "overflow", rank)["steps"] for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert [step["metrics"]["loss_scale"] for step in ranks[0]] == [2.0**-n * 2.0**127 for n in range(5)]


@pytest.mark.parametrize("zero", [*STAGES, "zero 3 offloaded", "lora zero 3"])
def test_a_resumed_run_is_exact(world: Path, zero: str):
    assert result(world, 2, f"{zero} resumed") == result(world, 2, zero)


@pytest.mark.parametrize("zero", STAGES)
def test_another_strategy_resumes_from_a_checkpoint(world: Path, zero: str):
    alone = result(world, 1, "plain")
    for case in (f"{zero} to fsdp2", f"fsdp2 to {zero}"):
        alike(result(world, 2, case), alone, 1e-5)


def test_another_stage_resumes_from_a_checkpoint(world: Path):
    alike(result(world, 2, "zero 1 offloaded to zero 3"), result(world, 1, "plain"), 1e-5)


def test_offload_to_a_disk_is_exact_or_names_the_missing_requirement(world: Path):
    found, resumed = result(world, 2, "disk"), result(world, 2, "disk resumed")
    if "refused" in found:
        assert (
            "libaio" in found["refused"] and "set offload_optimizer and offload_parameters to 'cpu'" in found["refused"]
        )
        pytest.skip(found["refused"])
    # Parameters were there, too, and went away with the run.
    assert found.pop("on disk") and not list((world / "disk").iterdir())
    assert found == resumed
    alike(found, result(world, 1, "wide"), 1e-5)


def loss_of(world: Path, model: Any) -> float:
    """The mean loss on the rows that the worlds evaluate on."""
    objective, batch = NextToken(), torch.from_numpy(np.load(world / "text.npy")[:7]).long()
    with torch.no_grad():
        return float(objective.loss(model.eval(), batch)[0] / objective.count(batch))


@pytest.mark.parametrize("zero", [*STAGES, "zero 3 offloaded"])
def test_an_export_loads_in_transformers_and_gives_the_same_loss(world: Path, zero: str):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "exports" / f"{zero} to {zero}")
    told = result(world, 2, f"{zero} resumed")
    assert loss_of(world, model) == pytest.approx(told["evaluations"][-1]["loss"], abs=1e-5)


def test_an_adapter_loads_in_peft_and_gives_the_same_loss(world: Path):
    from peft import PeftModel

    base = build_model(SHAPE, None, TextEncoder(str(world / "tokenizer")), seed=0)
    model = PeftModel.from_pretrained(base, world / "exports" / "zero 3 to zero 3 lora")
    told = result(world, 2, "lora zero 3 resumed")
    assert loss_of(world, model) == pytest.approx(told["evaluations"][-1]["loss"], abs=1e-5)
