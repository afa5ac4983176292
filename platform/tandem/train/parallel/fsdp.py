"""FSDP2 sharding of a model or a pipeline stage: each decoder layer is a group of parameters, and the rest is one more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from tandem.config import TrainConfig
from tandem.train.model.precision import COMPUTE_DTYPES, mixed_precision_policy
from tandem.train.model.stage import Stage, TransformersForward
from tandem.train.parallel.expert import ParallelExperts
from tandem.train.parallel.mesh import Mesh


def needs_fsdp(config: TrainConfig) -> bool:
    """Whether FSDP2 wraps the model: if ranks share a stage, compute in another type than the weights', or offload them."""
    parallel = config.parallel
    sharded = parallel.workers > parallel.pipeline or config.precision in COMPUTE_DTYPES or parallel.offload
    return parallel.strategy == "fsdp2" and sharded


def shard_parameters(stage: Stage | TransformersForward, mesh: Mesh, config: TrainConfig) -> None:
    """Shard the parameters of `stage`, gradients and optimizer state with them, over the mesh, in place."""
    options: dict[str, Any] = {
        "mp_policy": mixed_precision_policy(config.precision),
        # Gathering again for every micro-batch of a pipeline would cost more than it saves.
        "reshard_after_forward": mesh.degrees.pp == 1,
    }
    if config.parallel.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_mesh.device_type != "cpu")
    for layer in stage.layers:
        for module in layer.modules():
            if isinstance(module, ParallelExperts):
                fully_shard(module, mesh=mesh.experts, **options)
                # The gradient of an expert already holds the tokens of all expert-parallel ranks.
                sharded: Any = module
                sharded.set_gradient_divide_factor(float(mesh.degrees.token_parallel))
        fully_shard(layer, mesh=mesh.parameters, **options)
    fully_shard(stage, mesh=mesh.parameters, **options)


def is_sharded(stage: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters of a stage."""
    return isinstance(stage, FSDPModule)


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Whether the next backward pass reduces gradients across ranks."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sync, recurse=False)


def parameter_device(config: TrainConfig, device: torch.device) -> torch.device:
    """The device that holds sharded parameters between their uses."""
    return torch.device("cpu") if config.parallel.offload else device
