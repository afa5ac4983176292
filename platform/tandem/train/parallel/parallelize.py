"""Composition of parallelism: experts, tensor, sequence and pipeline parallelism, then compilation and sharding.

Adapters and recomputation have to be in the model before. Sharding comes last: it groups the parameters that finally exist; an
adapter that was added after it would stay unsharded, and its copies would drift apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tandem.config import TrainConfig
from tandem.config.training.layout import STAGES_PER_RANK, ModelShape, check_layout, layers_known
from tandem.errors import LayoutError
from tandem.train.model.build import decoder_layers
from tandem.train.model.compiled import compile_layers
from tandem.train.model.flex_attention import document_block_mask, use_flex_attention
from tandem.train.model.stage import Mask, ShardSequence, Stage, TransformersForward, document_mask, whole_sequence
from tandem.train.parallel.context import shard_sequences
from tandem.train.parallel.expert import split_experts
from tandem.train.parallel.fsdp import needs_fsdp, parameter_device, shard_parameters
from tandem.train.parallel.mesh import Mesh
from tandem.train.parallel.mesh_model import MeshModel
from tandem.train.parallel.pipeline import Pipeline, causal_lm, keep_stages, layers_of_stage, stages_of
from tandem.train.parallel.sharded_load import allocate_parameters, is_on_meta
from tandem.train.parallel.tensor import split_tensors

Stages = dict[int, Stage | TransformersForward]
"""The stages that this rank holds, by number; without a pipeline, the whole model as stage 0."""


def parallelize(model: nn.Module, mesh: Mesh, config: TrainConfig, device: torch.device) -> MeshModel:
    """Distribute `model` (a transformers causal LM, under peft or not, the same on every rank) over `mesh`, in place.

    A model on the meta device (see `sharded_load`) gets memory, and waits for its weights. Raises LayoutError if the model cannot
    be split as `config` says.
    """
    lm = causal_lm(model)
    shape = ModelShape.read(lm.config.to_dict())
    check_layout(shape, config)
    shard_sequence, stages = _split(lm, shape, mesh, config)
    on_meta = is_on_meta(model)
    if not on_meta:
        model.to(device)
        _check_documents(stages, device)
    if config.compile:
        compile_layers(layer for stage in stages.values() for layer in stage.layers)
    # Sharding comes after compilation: FSDP2's hooks stay outside of the compiled layers.
    if needs_fsdp(config):
        for stage in stages.values():
            shard_parameters(stage, mesh, config)
    if on_meta:
        for stage in stages.values():
            allocate_parameters(stage, parameter_device(config, device))
    pipeline = None
    if config.parallel.pipeline > 1:
        pipeline = Pipeline.of(stages, mesh["pp"], config=config, lm_config=lm.config, device=device)
    return MeshModel(
        model,
        list(stages.values()),
        mesh=mesh,
        shard_sequence=shard_sequence,
        pipeline=pipeline,
        replicated=_needs_ddp(model, config),
        device=device,
    )


def _split(lm: Any, shape: ModelShape, mesh: Mesh, config: TrainConfig) -> tuple[ShardSequence, Stages]:
    """This rank's function that shards sequences, and its stages of the model."""
    if layers_known(shape, config):
        return _split_layers(lm, mesh, config)
    if config.attention == "flex":
        raise LayoutError(
            f"attention is 'flex', for which training goes through the layers itself, and those of a {shape.family!r} are not "
            "known. Set attention to 'sdpa'."
        )
    return whole_sequence, {0: TransformersForward(lm, decoder_layers(lm))}


def _split_layers(lm: Any, mesh: Mesh, config: TrainConfig) -> tuple[ShardSequence, Stages]:
    """Split sequences, layers, experts and matrices of a causal LM, in place, in the one order that is exact."""
    degrees, parallel = mesh.degrees, config.parallel
    shard_sequence: ShardSequence = shard_sequences(lm, mesh["cp"]) if degrees.cp > 1 else whole_sequence
    mask: Mask = document_mask
    if config.attention == "flex":
        use_flex_attention(lm)
        mask = document_block_mask
    num_stages = degrees.pp * (STAGES_PER_RANK[parallel.schedule] if degrees.pp > 1 else 1)
    numbers = stages_of(mesh["pp"].get_local_rank(), degrees.pp, parallel.schedule) if degrees.pp > 1 else [0]
    layers = [layers_of_stage(number, num_stages, lm.config.num_hidden_layers) for number in numbers]
    if num_stages > 1:
        keep_stages(lm, numbers, num_stages, layers)
    split_experts(lm, mesh.expert_tensor)
    split_tensors(
        lm,
        mesh["tp"],
        sequence_parallel=parallel.sequence_parallel,
        # Only next-token cross-entropy is computed on logits that are sharded along the vocabulary.
        loss_parallel=config.objective == "next_token",
    )
    last = num_stages - 1
    return shard_sequence, {
        number: Stage(
            lm, stage_layers, first=number == 0, last=number == last, shard_sequence=shard_sequence, mask=mask
        )
        for number, stage_layers in zip(numbers, layers, strict=True)
    }


def _check_documents(stages: Stages, device: torch.device) -> None:
    for stage in stages.values():
        if isinstance(stage, TransformersForward):
            stage.check_documents(device)


def _needs_ddp(model: nn.Module, config: TrainConfig) -> bool:
    # A frozen model (DPO's reference) has no gradients to average: DDP refuses it.
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    return config.parallel.strategy == "ddp" and config.parallel.workers > 1 and trainable
