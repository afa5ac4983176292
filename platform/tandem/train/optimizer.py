"""Optimizer construction: AdamW over the trained parameters, in groups with and without weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tandem.config import OptimizerConfig
from tandem.errors import ConfigError, EnvironmentProblem
from tandem.train.model.stage import Stage


def build_optimizer(model: nn.Module, config: OptimizerConfig, device: torch.device) -> Optimizer:
    """AdamW over the parameters of `model` that require gradients, sharded (DTensor) or not.

    Raises ConfigError for adamw_8bit anywhere but on a GPU, EnvironmentProblem if its package is not installed.
    """
    groups = [group for group in decay_groups(model, config) if group["params"]]
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas}
    if config.name == "adamw_8bit":
        return _adamw_8bit(groups, common, device)
    # None leaves the choice to torch: `fused=False` would also disable its foreach kernels.
    return torch.optim.AdamW(groups, **common, fused=config.fused or None)


def decay_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Two parameter groups, with and without weight decay; each trained parameter is in one of them, once."""
    embeddings = set() if config.decay_embeddings else {id(p) for p in _embeddings(model)}
    decaying: list[nn.Parameter] = []
    not_decaying: list[nn.Parameter] = []
    # `parameters()` yields a tied parameter once.
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            (decaying if decays else not_decaying).append(parameter)
    return [{"params": decaying, "weight_decay": config.weight_decay}, {"params": not_decaying, "weight_decay": 0.0}]


@torch.no_grad()
def start_state(optimizer: Optimizer) -> None:
    """Create AdamW's state of each parameter as its first step would, unless there is one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                on_device = group.get("fused") or group.get("capturable")
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
                # torchao creates 8-bit state.
                empty: Any = getattr(
                    optimizer, "_new_buffer", lambda p, signed: torch.zeros_like(p, requires_grad=False)
                )
                state["exp_avg"], state["exp_avg_sq"] = empty(parameter, True), empty(parameter, False)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of every group; in place if the optimizer keeps it as a tensor, as torchao's do."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(recurse=False)
        elif isinstance(module, Stage) and module.tied and module.lm_head is not None:
            # The copy of a tied embedding in the last pipeline stage.
            yield from module.lm_head.parameters(recurse=False)


def _adamw_8bit(groups: list[dict[str, Any]], common: dict[str, Any], device: torch.device) -> Optimizer:
    if device.type == "cpu":
        raise ConfigError(
            "optimizer.name is 'adamw_8bit', whose kernels are for GPUs, and this worker has none. "
            "Set parallel.gpus_per_worker to 1, or optimizer.name to 'adamw'."
        )
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise EnvironmentProblem(
            "optimizer.name 'adamw_8bit' needs torchao, which is not installed here. `pip install 'tandem[gpu]'` brings it."
        ) from error
    optimizer: Optimizer = AdamW8bit(groups, **common)
    return optimizer
