"""Two processes under DeepSpeed train like one: every stage and offload, resumed, evaluated and exported."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_world import QUICK, ZERO
from objectives_world import SHAPE
from worlds import alike, result, run_worlds

from tandem.data.tokenize import TextEncoder
from tandem.train.model.build import build_model
from tandem.train.objectives.objective import NextToken

STAGES = ("zero 1", "zero 2", "zero 3")
TOLERANCES = {"float16": 0.01, "bfloat16": 0.05}
"""Of losses, by precision."""


def each(*names: str) -> list[Any]:
    """Cases as parameters of a test; those that are not among QUICK are slow: each makes an engine of DeepSpeed, for 2 s."""
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


class Worlds:
    """What one process and two processes gave for every case of deepspeed_world.py; the quick cases run first, alone."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    @cached_property
    def quick(self) -> Path:
        """The folder of the quick cases, and of one process."""
        return run_worlds("deepspeed_world.py", self._factory.mktemp("deepspeed"), arguments=("quick",))

    @cached_property
    def rest(self) -> Path:
        """The folder of the other cases."""
        return run_worlds("deepspeed_world.py", self._factory.mktemp("deepspeed-rest"), arguments=("rest",))

    def folder(self, case: str) -> Path:
        return self.quick if case in QUICK else self.rest

    def alone(self, case: str) -> dict[str, Any]:
        """What one process gave."""
        return result(self.quick, 1, case)

    def of(self, case: str, rank: int = 0) -> dict[str, Any]:
        """What a rank of two processes gave."""
        return result(self.folder(case), 2, case, rank)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory)


@pytest.mark.parametrize("zero", each(*ZERO))
def test_every_stage_and_offload_trains_and_evaluates_like_one_process(worlds: Worlds, zero: str):
    alone = worlds.alone("plain")
    # Every step is clipped, to 0.5.
    assert all(step["grad_norm"] > 0.5 for step in alone["steps"])
    alike(worlds.of(zero), alone, 1e-5)


def test_one_worker_trains_under_deepspeed(worlds: Worlds):
    alike(worlds.alone("zero 3"), worlds.alone("plain"), 1e-5)


@pytest.mark.parametrize("case", each(*(f"{kind} {zero}" for kind in ("lora", "dpo lora") for zero in STAGES)))
def test_adapters_train_like_in_one_process(worlds: Worlds, case: str):
    alike(worlds.of(case), worlds.alone(case.partition(" zero")[0]), 1e-5)


def test_dpo_trains_with_a_sharded_reference(worlds: Worlds):
    alike(worlds.of("dpo zero 3"), worlds.alone("dpo"), 1e-5)


def test_averages_equal_those_of_one_process(worlds: Worlds):
    alike(worlds.of("ema zero 2"), worlds.alone("ema"), 1e-5)


@pytest.mark.parametrize("case", each("full zero 3", "selective zero 3"))
def test_recomputation_changes_no_loss(worlds: Worlds, case: str):
    alike(worlds.of(case), worlds.alone("plain"), 1e-5)


@pytest.mark.parametrize("case", each(*(f"{precision} {zero}" for precision in TOLERANCES for zero in STAGES)))
def test_lower_precision_is_close_to_float32(worlds: Worlds, case: str):
    precision = case.partition(" ")[0]
    exact = [step["loss"] for step in worlds.alone("plain")["steps"]]
    steps = worlds.of(case)["steps"]
    assert [step["loss"] for step in steps] == pytest.approx(exact, abs=TOLERANCES[precision])
    assert [step["loss"] for step in steps] != pytest.approx(exact, abs=1e-7)
    if precision == "float16":
        assert [step["metrics"]["loss_scale"] for step in steps] == [2.0**16] * len(steps)


def test_overflowing_steps_are_skipped_and_halve_the_scale(worlds: Worlds):
    ranks = [worlds.of("overflow", rank)["steps"] for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert [step["metrics"]["loss_scale"] for step in ranks[0]] == [2.0**-n * 2.0**127 for n in range(5)]


@pytest.mark.parametrize("case", each(*(f"{case} resumed" for case in (*STAGES, "zero 3 offloaded", "lora zero 3"))))
def test_a_resumed_run_is_exact(worlds: Worlds, case: str):
    assert worlds.of(case) == worlds.of(case.removesuffix(" resumed"))


@pytest.mark.parametrize("case", each(*(case for zero in STAGES for case in (f"{zero} to fsdp2", f"fsdp2 to {zero}"))))
def test_another_strategy_resumes_from_a_checkpoint(worlds: Worlds, case: str):
    alike(worlds.of(case), worlds.alone("plain"), 1e-5)


@pytest.mark.slow  # a world of two processes more
def test_another_stage_resumes_from_a_checkpoint(worlds: Worlds):
    alike(worlds.of("zero 1 offloaded to zero 3"), worlds.alone("plain"), 1e-5)


@pytest.mark.slow  # a model of 25 MB, trained three times
def test_offload_to_a_disk_is_exact_or_names_the_missing_requirement(worlds: Worlds):
    found, resumed = worlds.of("disk"), worlds.of("disk resumed")
    if "refused" in found:
        assert (
            "libaio" in found["refused"] and "set offload_optimizer and offload_parameters to 'cpu'" in found["refused"]
        )
        pytest.skip(found["refused"])
    # Parameters were there, too, and went away with the run.
    assert found.pop("on disk") and not list((worlds.rest / "disk").iterdir())
    assert found == resumed
    alike(found, result(worlds.rest, 1, "wide"), 1e-5)


def loss_of(world: Path, model: Any) -> float:
    """The mean loss on the rows that the worlds evaluate on."""
    objective, batch = NextToken(), torch.from_numpy(np.load(world / "text.npy")[:7]).long()
    with torch.no_grad():
        return float(objective.loss(model.eval(), batch)[0] / objective.count(batch))


@pytest.mark.parametrize("case", each(*(f"{zero} resumed" for zero in (*STAGES, "zero 3 offloaded"))))
def test_an_export_loads_in_transformers_and_gives_the_same_loss(worlds: Worlds, case: str):
    from transformers import AutoModelForCausalLM

    world, zero = worlds.folder(case), case.removesuffix(" resumed")
    model = AutoModelForCausalLM.from_pretrained(world / "exports" / f"{zero} to {zero}")
    told = worlds.of(case)
    assert loss_of(world, model) == pytest.approx(told["evaluations"][-1]["loss"], abs=1e-5)


def test_an_adapter_loads_in_peft_and_gives_the_same_loss(worlds: Worlds):
    from peft import PeftModel

    world = worlds.quick
    base = build_model(SHAPE, None, TextEncoder(str(world / "tokenizer")), seed=0)
    model = PeftModel.from_pretrained(base, world / "exports" / "zero 3 to zero 3 lora")
    told = worlds.of("lora zero 3 resumed")
    assert loss_of(world, model) == pytest.approx(told["evaluations"][-1]["loss"], abs=1e-5)
