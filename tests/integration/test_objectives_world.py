"""DPO, weight averages and evaluations give the same results on two ranks as on one, and do not change training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from worlds import alike, result, run_worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one process and two processes gave for every case of objectives_world.py."""
    return run_worlds("objectives_world.py", tmp_path_factory.mktemp("objectives"))


@pytest.mark.parametrize("case", ["ema", "dpo", "dpo lora"])
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_two_ranks_report_and_evaluate_like_one(world: Path, case: str, strategy: str):
    found, alone = result(world, 2, f"{case} {strategy}"), result(world, 1, f"{case} fsdp2")
    assert len(alone["evaluations"]) == 3 and alone["evaluations"][-1]["loss"] < alone["evaluations"][0]["loss"]
    alike(found, alone, 1e-5)


def test_dpo_increases_the_reported_margin(world: Path):
    told = result(world, 1, "dpo lora fsdp2")
    # An adapter starts as nothing: no margin, and log 2 for every pair.
    assert told["steps"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told["steps"][0]["metrics"] == {"reward_margin": 0.0, "reward_accuracy": 0.0}
    assert told["evaluations"][-1]["reward_margin"] > 0 and told["evaluations"][-1]["reward_accuracy"] > 0.5


@pytest.mark.parametrize(("case", "without"), [("ema fsdp2", "undisturbed"), ("dpo lora fsdp2", "undisturbed lora")])
@pytest.mark.parametrize("size", [1, 2])
def test_evaluations_and_averages_do_not_change_training(world: Path, case: str, without: str, size: int):
    assert result(world, size, case)["steps"] == result(world, size, without)["steps"]


def test_the_average_is_evaluated_in_place_of_the_weights(world: Path):
    for told in result(world, 2, "ema fsdp2")["evaluations"]:
        assert abs(told["averaged"] - told["loss"]) > 1e-4


def test_only_token_objectives_have_a_perplexity(world: Path):
    text, pairs = (result(world, 1, case)["evaluations"][-1] for case in ("ema fsdp2", "dpo fsdp2"))
    assert text["perplexity"] == pytest.approx(math.exp(text["loss"])) and "perplexity" not in pairs


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("size", [1, 2])
def test_recomputation_changes_no_loss(world: Path, mode: str, size: int):
    alike(result(world, size, mode), result(world, size, "ema fsdp2"), 1e-6)


@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
@pytest.mark.parametrize("size", [1, 2])
def test_lower_precision_is_close_to_float32(world: Path, precision: str, tolerance: float, size: int):
    exact = [step["loss"] for step in result(world, 1, "ema fsdp2")["steps"]]
    found = [step["loss"] for step in result(world, size, precision)["steps"]]
    assert found == pytest.approx(exact, abs=tolerance) and found != pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_restores_its_average_and_its_scale(world: Path, size: int):
    found, undisturbed = result(world, size, "resumed"), result(world, size, "float16")
    alike(found, undisturbed, 1e-6)


def test_overflowing_steps_are_skipped_on_every_rank(world: Path):
    ranks = [result(world, 2, "overflow", rank) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    scales = [step["metrics"]["loss_scale"] for step in ranks[0]["steps"]]
    assert scales == [2.0**-n * 2.0**127 for n in range(5)]


@pytest.mark.parametrize("size", [1, 2])
def test_the_average_is_exported(world: Path, size: int):
    import torch
    from transformers import AutoModelForCausalLM

    from tandem.train.objectives.objective import NextToken

    model = AutoModelForCausalLM.from_pretrained(world / f"export-fsdp2-{size}")
    rows = np.load(world / "text.npy")[:7]
    objective, batch = NextToken(), torch.from_numpy(rows).long()
    with torch.no_grad():
        found = float(objective.loss(model, batch)[0] / objective.count(batch))
    assert found == pytest.approx(result(world, size, "resumed")["evaluations"][-1]["averaged"], abs=5e-3)
