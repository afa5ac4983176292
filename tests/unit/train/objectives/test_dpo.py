"""DPO equals the paper's formula pair by pair, packed or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tandem.config import DpoConfig, LoraConfig
from tandem.data.packing import pack_preferences
from tandem.data.tokenize import Encoded
from tandem.train.adapters.lora import add_adapters
from tandem.train.objectives.dpo import AdapterDisabledReference, Dpo, FrozenReference, answer_log_probabilities


def answer(prompt: list[int], reply: list[int]) -> Encoded:
    return Encoded(prompt + reply, [False] * len(prompt) + [True] * len(reply))


PAIRS = [
    (answer([5, 6, 7], [8, 9]), answer([5, 6, 7], [10, 11, 12])),
    (answer([20, 21], [22, 23, 24, 25]), answer([20, 21], [26])),
    (answer([30] * 6, [31, 32, 33]), answer([30] * 6, [34, 35])),
    (answer([40], [41]), answer([40], [42, 43, 44, 45, 46, 47])),
]


@pytest.fixture
def rows() -> torch.Tensor:
    packed = pack_preferences(PAIRS, 14, 0)
    assert 1 < len(packed) < len(PAIRS), "some row holds several pairs"
    return torch.from_numpy(packed).long()


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


def frozen(model: torch.nn.Module) -> FrozenReference:
    return FrozenReference(copy.deepcopy(model).requires_grad_(False))


def log_probability(model: torch.nn.Module, document: Encoded) -> torch.Tensor:
    """Token by token, the document alone."""
    logits = model(input_ids=torch.tensor([document.ids])).logits[0].double()
    told = logits.log_softmax(-1)
    return sum(
        (told[n - 1, document.ids[n]] for n in range(1, len(document.ids)) if document.targets[n]),
        torch.zeros((), dtype=torch.float64),
    )


def by_the_paper(
    model: torch.nn.Module, reference: torch.nn.Module, config: DpoConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss over PAIRS, and the margins: equation 7 of Rafailov et al. 2023, with Mitchell's label smoothing."""
    margins = []
    for chosen, rejected in PAIRS:
        gain = log_probability(model, chosen) - log_probability(reference, chosen).detach()
        loss_of = log_probability(model, rejected) - log_probability(reference, rejected).detach()
        margins.append(config.beta * (gain - loss_of))
    found = torch.stack(margins)
    right, wrong = torch.sigmoid(found).log(), torch.sigmoid(-found).log()
    return -((1 - config.label_smoothing) * right + config.label_smoothing * wrong).sum(), found.detach()


@pytest.mark.parametrize("config", [DpoConfig(), DpoConfig(beta=0.5, label_smoothing=0.1)])
def test_loss_gradients_and_metrics_are_those_of_the_paper(model: Any, rows: torch.Tensor, config: DpoConfig):
    reference = perturbed(model)
    expected, margins = by_the_paper(model, reference, config)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    objective = Dpo(config, frozen(reference))
    assert int(objective.count(rows)) == len(PAIRS)
    loss, sums = objective.loss(model, rows)
    loss.backward()
    # The model is float32: sums of a hundred log-probabilities agree to six digits.
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-6)
    assert float(sums["reward_margin"]) == pytest.approx(float(margins.sum()), rel=2e-6, abs=1e-6)
    assert float(sums["reward_accuracy"]) == int((margins > 0).sum())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_margin_is_zero_before_training(model: torch.nn.Module, rows: torch.Tensor):
    loss, sums = Dpo(DpoConfig(), frozen(model)).loss(model, rows)
    assert float(loss.detach()) == pytest.approx(len(PAIRS) * 0.6931472, abs=1e-6)
    assert float(sums["reward_margin"]) == 0


def test_a_frozen_reference_is_not_trained(model: torch.nn.Module, rows: torch.Tensor):
    reference = copy.deepcopy(model).train()
    with pytest.raises(AssertionError, match="frozen before it is sharded"):
        FrozenReference(reference)
    loss, _ = Dpo(DpoConfig(), FrozenReference(reference.requires_grad_(False))).loss(model, rows)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters()) and not reference.training


def test_the_model_with_disabled_adapters_is_the_reference(model: torch.nn.Module, rows: torch.Tensor):
    base = copy.deepcopy(model)
    adapted = add_adapters(model, LoraConfig(rank=4, dropout=0.5), base_id="b", seed=0).train()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    # Dropout of the base's own must be off, too.
    for module in adapted.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad(), AdapterDisabledReference().model_for(adapted) as reference:
        found = answer_log_probabilities(reference, rows[:, :3])
    torch.testing.assert_close(found, answer_log_probabilities(base, rows[:, :3]).detach(), atol=1e-6, rtol=0)
    assert adapted.training and {name for name, p in adapted.named_parameters() if p.requires_grad} == trained
    adapted.eval()
    loss, _ = Dpo(DpoConfig(), AdapterDisabledReference()).loss(adapted, rows)
    apart, _ = Dpo(DpoConfig(), frozen(base)).loss(adapted, rows)
    assert float(loss.detach()) == pytest.approx(float(apart.detach()), abs=1e-6)
    assert float(loss.detach()) != pytest.approx(len(PAIRS) * 0.6931472, abs=1e-3)


def test_padding_rows_have_zero_loss(model: torch.nn.Module, rows: torch.Tensor):
    padding = rows.clone()
    padding[:, 1::3] = -100
    objective = Dpo(DpoConfig(), frozen(model))
    assert int(objective.count(padding)) == 0
    assert float(objective.loss(model, padding)[0].detach()) == 0
