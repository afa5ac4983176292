"""Matrices decay, vectors do not, and no parameter is updated twice."""

from __future__ import annotations

import pytest
import torch

from tandem.config import LoraConfig, ModelConfig, OptimizerConfig
from tandem.data.tokenize import TextEncoder
from tandem.errors import ConfigError
from tandem.train.adapters.lora import add_adapters
from tandem.train.model.build import build_model
from tandem.train.optimizer import build_optimizer, decay_groups, set_learning_rate

CPU = torch.device("cpu")
SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_length=64)


def named(model: torch.nn.Module, config: OptimizerConfig) -> list[set[str]]:
    """The names in each group; a tied parameter has all of its names."""
    found = []
    for group in decay_groups(model, config):
        held = {id(p) for p in group["params"]}
        found.append({name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in held})
    return found


def test_matrices_decay_and_norms_do_not(model: torch.nn.Module):
    decaying, free = named(model, OptimizerConfig())
    assert free and all("norm" in name for name in free)
    assert "model.layers.0.mlp.up_proj.weight" in decaying and "model.embed_tokens.weight" in decaying
    assert decaying | free == {name for name, _ in model.named_parameters(remove_duplicate=False)}


def test_biases_do_not_decay():
    layer = torch.nn.Linear(3, 3)
    assert named(layer, OptimizerConfig()) == [{"weight"}, {"bias"}]


def test_embeddings_can_be_kept_from_decaying_and_a_tied_output_with_them(model: torch.nn.Module):
    decaying, free = named(model, OptimizerConfig(decay_embeddings=False))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= free
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & decaying


def test_an_untied_output_decays(encoder: TextEncoder):
    shape = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, tie_embeddings=False)
    decaying, free = named(build_model(shape, None, encoder, 0), OptimizerConfig(decay_embeddings=False))
    assert "lm_head.weight" in decaying and "model.embed_tokens.weight" in free


def test_a_tied_parameter_is_in_one_group_once(model: torch.nn.Module):
    optimizer = build_optimizer(model, OptimizerConfig(), CPU)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))


def test_only_trained_parameters_are_in_a_group(model: torch.nn.Module):
    adapted = add_adapters(model, LoraConfig(rank=4), base_id="b", seed=0)
    optimizer = build_optimizer(adapted, OptimizerConfig(), CPU)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in adapted.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("fused", [True, False])
def test_decay_shrinks_a_matrix_without_a_gradient_and_leaves_a_norm(fused: bool):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4, bias=False))
    torch.nn.init.ones_(module[0].weight)
    optimizer = build_optimizer(module, OptimizerConfig(learning_rate=0.1, weight_decay=0.5, fused=fused), CPU)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module[0].weight, torch.full((4, 4), 1 - 0.1 * 0.5))
    torch.testing.assert_close(module[1].weight, torch.ones(4))


def test_fused_and_not_fused_take_the_same_step(model: torch.nn.Module, encoder: TextEncoder):
    other = build_model(SHAPE, None, encoder, seed=0)
    for trained, fused in ((model, True), (other, False)):
        optimizer = build_optimizer(trained, OptimizerConfig(fused=fused), CPU)
        for number, parameter in enumerate(trained.parameters()):
            parameter.grad = torch.sin(torch.arange(parameter.numel()) + number).view_as(parameter)
        optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_8_bit_state_is_refused_without_a_gpu(model: torch.nn.Module):
    with pytest.raises(ConfigError, match=r"adamw_8bit.*gpus_per_worker to 1"):
        build_optimizer(model, OptimizerConfig(name="adamw_8bit"), CPU)


def test_the_rate_is_set_in_every_group_in_place_if_it_is_a_tensor():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    rate = torch.tensor(1.0)
    optimizer = torch.optim.AdamW([{"params": parameters[:1], "lr": rate}, {"params": parameters[1:]}], lr=1.0)
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25
    assert optimizer.param_groups[1]["lr"] == 0.25


@pytest.mark.gpu
def test_8_bit_state_trains_on_a_gpu(encoder: TextEncoder):
    pytest.importorskip("torchao")
    device = torch.device("cuda")
    shape = ModelConfig(hidden_size=128, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=256)
    model = build_model(shape, None, encoder, 0).to(device)
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw_8bit", learning_rate=1e-2), device)
    ids = torch.arange(32, device=device)[None]
    losses = []
    for _ in range(10):
        set_learning_rate(optimizer, 1e-2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5
