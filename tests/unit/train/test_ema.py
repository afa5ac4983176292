"""The moving average follows the weights, and can be swapped into the model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tandem.config import LoraConfig
from tandem.train.adapters.lora import add_adapters
from tandem.train.ema import Ema


def plain(values: list[float], decay: float) -> float:
    """The average after weights `values`, of which the first is where training began."""
    average = values[0]
    for step, value in enumerate(values[1:], 1):
        now = min(decay, (1 + step) / (10 + step))
        average = now * average + (1 - now) * value
    return average


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_ema_is_the_decayed_average_of_the_weights(decay: float):
    module = torch.nn.Linear(1, 1, bias=False)
    values = [1.0, 3.0, -2.0, 5.0, 5.0]
    module.weight.data.fill_(values[0])
    ema = Ema(module, decay)
    for value in values[1:]:
        module.weight.data.fill_(value)
        ema.update(module)
    with ema.swapped(module):
        assert float(module.weight.detach()) == pytest.approx(plain(values, decay))


def test_swapping_the_average_restores_the_weights_bit_for_bit(model: torch.nn.Module):
    ema = Ema(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    ema.update(model)
    trained = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), ema.swapped(model):
        assert not torch.equal(model.lm_head.weight, trained["lm_head.weight"])
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        raise KeyError
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_only_trained_parameters_are_averaged(model: torch.nn.Module):
    adapted = add_adapters(model, LoraConfig(rank=4), base_id="b", seed=0)
    names = set(Ema(adapted, 0.9).state_dict()["average"])
    assert names == {name for name, p in adapted.named_parameters() if p.requires_grad}


def averages(ema: Ema) -> dict[str, torch.Tensor]:
    return {name: held for name, part in ema.state_dict()["average"].items() for held in part.chunks.values()}


def test_a_checkpoint_restores_the_average(model: torch.nn.Module, tmp_path: Path):
    ema = Ema(model, 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    ema.update(model)
    dcp.save({"ema": ema}, checkpoint_id=tmp_path, no_dist=True)
    other = Ema(model, 0.9)
    dcp.load({"ema": other}, checkpoint_id=tmp_path, no_dist=True)
    assert ema.state_dict()["updates"] == other.state_dict()["updates"] == 1
    ours, theirs = averages(ema), averages(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_loading_a_state_copies_it(model: torch.nn.Module):
    ema, other = Ema(model, 0.9), Ema(model, 0.9)
    other.load_state_dict(ema.state_dict())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    ema.update(model)
    name = "model.embed_tokens.weight"
    assert not torch.equal(averages(ema)[name], averages(other)[name])
