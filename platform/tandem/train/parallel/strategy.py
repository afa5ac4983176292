"""Parallel strategy of a config: FSDP2 or DDP over the mesh, or a DeepSpeed engine."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.optim import Optimizer

from tandem.config import TrainConfig
from tandem.train.optimizer import build_optimizer
from tandem.train.parallel.deepspeed import wrap_in_deepspeed
from tandem.train.parallel.mesh import Mesh
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.parallelize import parallelize


def parallelize_for_training(
    model: nn.Module, mesh: Mesh, config: TrainConfig, device: torch.device
) -> tuple[ParallelModel, Optimizer]:
    """Distribute `model` (a transformers causal LM, under peft or not, the same on every rank) in place; with its optimizer.

    Raises LayoutError if the model cannot be split as configured, EnvironmentProblem if this machine lacks a requirement.
    """
    if config.parallel.strategy == "deepspeed":
        return wrap_in_deepspeed(model, mesh, config, device)
    parallel_model = parallelize(model, mesh, config, device)
    return parallel_model, build_optimizer(parallel_model, config.optimizer, device)


def parallelize_frozen(model: nn.Module, mesh: Mesh, config: TrainConfig, device: torch.device) -> ParallelModel:
    """Distribute a frozen model, such as DPO's reference. Raises LayoutError."""
    if config.parallel.strategy == "deepspeed":
        # A DeepSpeed engine needs an optimizer. FSDP2 shards frozen parameters as ZeRO 3 would.
        config = replace(config, deepspeed=None, parallel=replace(config.parallel, strategy="fsdp2"))
    return parallelize(model, mesh, config, device)
