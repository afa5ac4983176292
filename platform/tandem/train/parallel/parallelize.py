"""Lays a model over the mesh: experts, tensors, sequences, pipeline stages, and shards, in the one order that is exact.

Adapters and recomputation have to be in before. Sharding comes last: it groups the parameters that finally exist; an adapter that
was added after it would stay whole on every rank, and drift apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tandem.checkpoint.chunks import ChunkedTensor
from tandem.checkpoint.tensors import ExportTensor
from tandem.config import TrainConfig
from tandem.config.training.layout import STAGES_PER_RANK, ModelShape, check_layout, layers_known
from tandem.errors import LayoutError
from tandem.train.compiled import compile_layers
from tandem.train.flex_attention import document_block_mask, use_flex_attention
from tandem.train.model import decoder_layers, reshard
from tandem.train.optimizer import start_state
from tandem.train.parallel.canonical import (
    canonical,
    canonical_name,
    expert_parameter_names,
    persistent_buffers,
    sync_tied,
)
from tandem.train.parallel.context import shard_sequences
from tandem.train.parallel.expert import ParallelExperts, split_experts
from tandem.train.parallel.mesh import Mesh
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.pipeline import Pipeline, causal_lm, keep_stages, layers_of_stage, stages_of
from tandem.train.parallel.sharded_load import allocate_parameters, is_on_meta
from tandem.train.parallel.tensor import split_tensors
from tandem.train.precision import COMPUTE_DTYPES, LossScaler, mixed_precision_policy
from tandem.train.stage import Mask, Share, Stage, TransformersForward, document_mask, whole_sequence


class MeshModel(ParallelModel):
    """A causal LM as one rank of the mesh holds it. Without a pipeline it is called as transformers' models are."""

    _whole: nn.Module
    _called: nn.Module

    def __init__(
        self,
        whole: nn.Module,
        stages: Sequence[nn.Module],
        *,
        mesh: Mesh,
        share: Share,
        pipeline: Pipeline | None,
        replicated: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.mesh = mesh
        self.share = share
        self.pipeline = pipeline
        self._device = device
        # Not a submodule: its parameters are the stages', under the names that checkpoints and exports have.
        object.__setattr__(self, "_whole", whole)
        called: nn.Module = stages[0]
        if replicated:
            group = mesh["dp_replicate"].get_group()
            called = DistributedDataParallel(
                called, process_group=group, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
        object.__setattr__(self, "_called", called)
        self._tied = _TiedStages.of(self)

    @property
    def whole(self) -> nn.Module:
        """See `ParallelModel`."""
        return self._whole

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """See `ParallelModel`."""
        return SimpleNamespace(logits=self._called(input_ids, position_ids))

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the parameters."""
        return isinstance(self.stages[0], FSDPModule)

    @contextlib.contextmanager
    def gradients_synced(self, sync: bool) -> Iterator[None]:
        """See `ParallelModel`."""
        if isinstance(self._called, DistributedDataParallel) and not sync:
            with self._called.no_sync():
                yield
            return
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(sync, recurse=False)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `ParallelModel`."""
        loss.backward()

    def step(self, optimizer: Optimizer, limit: float, scaler: LossScaler | None, loss: Tensor) -> tuple[float, bool]:
        """See `ParallelModel`."""
        if scaler:
            scaler.unscale(p.grad for p in self.parameters() if p.grad is not None)
        norm = self.clip(limit, loss)
        taken = scaler.accept(norm) if scaler else math.isfinite(norm)
        if taken:
            optimizer.step()
        optimizer.zero_grad()
        return norm, taken

    def finish_gradients(self) -> None:
        """See `ParallelModel`."""
        if self._tied is not None:
            self._tied.sum_gradients(self._device)

    def training_state(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """See `ParallelModel`. It shares the memory of what is trained."""
        reshard(self)
        start_state(optimizer)
        state: dict[str, ChunkedTensor] = {}
        for key, held in self._optimizer_state(optimizer).items():
            state |= {f"{name}.{key}": part for name, part in canonical(self.whole, held).items()}
        return {"model": canonical(self.whole, self._trained()), "optimizer": dict(state)}

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Optimizer) -> None:
        """See `ParallelModel`: what was loaded is there already."""
        for held in (self._trained(), *self._optimizer_state(optimizer).values()):
            sync_tied(self.whole, held)

    def _trained(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.whole.named_parameters() if p.requires_grad}
        return {**trained, **dict(persistent_buffers(self.whole))}

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
        """For each thing that the optimizer keeps of a parameter: that of all parameters, by their names."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.whole.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                found.setdefault(key, {})[name] = value
        return found

    def weights(self) -> list[ExportTensor]:
        """See `ParallelModel`."""
        reshard(self)
        adapters = hasattr(self.whole, "peft_config")
        tensors: dict[str, Tensor] = {n: p for n, p in self.whole.named_parameters() if p.requires_grad or not adapters}
        if not adapters:
            tensors |= dict(persistent_buffers(self.whole))
        # A second copy of an embedding is told by the stage that has the first.
        experts = expert_parameter_names(self.whole)
        return [
            _held(name, t, name in experts) for name, t in tensors.items() if canonical_name(self.whole, name) == name
        ]

    def clip(self, limit: float, loss: Tensor | None = None) -> float:
        """Scale gradients down to a global norm of `limit` (0: leave them); returns the norm before, over the whole mesh.

        It is not a number if `loss` is not finite on any rank.
        """
        counted = [p for p in self.parameters() if p.grad is not None and not (self._tied and self._tied.repeats(p))]
        ranks = dist.get_world_size() // self.mesh.degrees.pp if dist.is_initialized() else 1
        squares = torch.zeros((), dtype=torch.float64, device=next(self.parameters()).device)
        for parameter in counted:
            # Row by row: float32 is exact enough for a row, and far faster than float64 for a matrix. Nothing waits for the
            # device. Ranks that hold the same part count it once between them.
            rows = torch.linalg.vector_norm(_local(parameter.grad), dim=-1).double()
            squares += rows.square().sum() * (_shards(parameter.grad) / ranks)
        if loss is not None:
            # Nothing, unless it is infinite or not a number: then all ranks come to know by the sum that they make anyway.
            squares += loss.detach().to(squares) * 0
        if dist.is_initialized():
            squares = squares.to(self._device)
            dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if limit:
            scale = min(1.0, limit / (norm + 1e-6))
            torch._foreach_mul_([_local(p.grad) for p in self.parameters() if p.grad is not None], scale)
        return norm


def parallelize(model: nn.Module, mesh: Mesh, config: TrainConfig, device: torch.device) -> MeshModel:
    """Lay `model` (a transformers causal LM, under peft or not, the same on every rank) over `mesh`, in place.

    Of an empty model (see `sharded_base`) the weights are to be filled in. Raises LayoutError if it cannot be cut in that way.
    """
    parallel = config.parallel
    lm = causal_lm(model)
    shape = ModelShape.read(lm.config.to_dict())
    check_layout(shape, config)
    share: Share = whole_sequence
    stages: Mapping[int, Stage | TransformersForward]
    if layers_known(shape, config):
        share, stages = _cut(lm, mesh, config)
    elif config.attention == "flex":
        raise LayoutError(
            f"attention is 'flex', for which training goes through the layers itself, and those of a {shape.family!r} are not "
            "known. Set attention to 'sdpa'."
        )
    else:
        stages = {0: TransformersForward(lm, decoder_layers(lm))}
    empty = is_on_meta(model)
    if not empty:
        model.to(device)
        for stage in stages.values():
            if isinstance(stage, TransformersForward):
                stage.check_documents(device)
    if config.compile:
        compile_layers(layer for stage in stages.values() for layer in stage.layers)
    # A frozen model (DPO's reference) has no gradients to average: DDP would refuse it.
    replicated = (
        parallel.strategy == "ddp" and parallel.workers > 1 and any(p.requires_grad for p in model.parameters())
    )
    # A rank that shares a stage with no other may still compute in another type than its weights have, or keep them elsewhere.
    shared = parallel.workers > parallel.pipeline or config.precision in COMPUTE_DTYPES or parallel.offload
    if parallel.strategy == "fsdp2" and shared:
        for stage in stages.values():
            _shard(stage, mesh, config)
    if empty:
        for stage in stages.values():
            allocate_parameters(stage, torch.device("cpu") if parallel.offload else device)
    pipeline = None
    if parallel.pipeline > 1:
        pipeline = Pipeline.of(stages, mesh["pp"], config=config, lm_config=lm.config, device=device)
    return MeshModel(
        model,
        list(stages.values()),
        mesh=mesh,
        share=share,
        pipeline=pipeline,
        replicated=replicated,
        device=device,
    )


def _cut(lm: Any, mesh: Mesh, config: TrainConfig) -> tuple[Share, dict[int, Stage]]:
    """Take out of a causal LM what other ranks have; how sequences are shared, and the stages that are left, by number."""
    degrees, parallel = mesh.degrees, config.parallel
    share: Share = shard_sequences(lm, mesh["cp"]) if degrees.cp > 1 else whole_sequence
    mask: Mask = document_mask
    if config.attention == "flex":
        use_flex_attention(lm)
        mask = document_block_mask
    parts = STAGES_PER_RANK[parallel.schedule] if degrees.pp > 1 else 1
    numbers = stages_of(mesh["pp"].get_local_rank(), degrees.pp, parallel.schedule) if degrees.pp > 1 else [0]
    of = degrees.pp * parts
    layers = [layers_of_stage(number, of, lm.config.num_hidden_layers) for number in numbers]
    if of > 1:
        keep_stages(lm, numbers, of, layers)
    split_experts(lm, mesh.expert_tensor)
    # Only the cross-entropy of the next token is computed on logits that are cut along the vocabulary.
    split_tensors(
        lm,
        mesh["tp"],
        sequence_parallel=parallel.sequence_parallel,
        loss_parallel=config.objective == "next_token",
    )
    return share, {
        number: Stage(lm, kept, first=number == 0, last=number == of - 1, share=share, mask=mask)
        for number, kept in zip(numbers, layers, strict=True)
    }


def _shard(stage: Stage | TransformersForward, mesh: Mesh, config: TrainConfig) -> None:
    options: dict[str, Any] = {
        "mp_policy": mixed_precision_policy(config.precision),
        # Gathering again for every micro-batch of a pipeline would cost more than it saves.
        "reshard_after_forward": mesh.degrees.pp == 1,
    }
    if config.parallel.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.whole.device_type != "cpu")
    for layer in stage.layers:
        for module in layer.modules():
            if isinstance(module, ParallelExperts):
                fully_shard(module, mesh=mesh.experts, **options)
                # Its gradient holds the tokens of all expert ranks already.
                sharded: Any = module
                sharded.set_gradient_divide_factor(float(mesh.degrees.token_parallel))
        fully_shard(layer, mesh=mesh.parameters, **options)
    fully_shard(stage, mesh=mesh.parameters, **options)


class _TiedStages:
    """An embedding that the first stage reads with and the last one writes with: two copies that must stay one."""

    def __init__(
        self, mine: list[nn.Parameter], repeated: nn.Parameter | None, group: dist.ProcessGroup | None
    ) -> None:
        self._mine, self._repeated, self._group = mine, repeated, group

    @classmethod
    def of(cls, model: MeshModel) -> _TiedStages | None:
        lm = causal_lm(model.whole)
        mesh, pipeline = model.mesh, model.pipeline
        if pipeline is None or not lm.config.tie_word_embeddings:
            return None
        group = None
        if STAGES_PER_RANK[pipeline.name] == 1 or pipeline.name == "interleaved":
            for column in mesh.whole.mesh.reshape(mesh.degrees.pp, -1).T.tolist():
                made = dist.new_group([column[0], column[-1]])
                if dist.get_rank() in (column[0], column[-1]):
                    group = made
        first = lm.model.embed_tokens.weight if lm.model.embed_tokens is not None else None
        last = lm.lm_head.weight if lm.lm_head is not None else None
        return cls([p for p in (first, last) if p is not None], last, group)

    def repeats(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is the copy that does not count."""
        return parameter is self._repeated

    def sum_gradients(self, device: torch.device) -> None:
        """Give both copies the sum of their gradients."""
        gradients = [_local(p.grad) for p in self._mine if p.grad is not None]
        if self._group is not None:
            for gradient in gradients:
                # It may have been offloaded.
                there = gradient.to(device)
                dist.all_reduce(there, group=self._group)
                gradient.copy_(there)
        elif len(gradients) == 2:
            total = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(total)


def _held(name: str, tensor: Tensor, expert_parameter_names: bool) -> ExportTensor:
    shape = tuple(tensor.shape)
    if expert_parameter_names:
        shape = (shape[0], shape[1] * shape[2], shape[3])

    @torch.no_grad()
    def whole() -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        return full.view(shape)

    return ExportTensor(name=name, shape=shape, dtype=tensor.dtype, whole=whole)


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def _shards(tensor: Any) -> int:
    """Into how many parts a gradient is cut over the ranks of a stage."""
    parts = 1
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            # A tensor that was cut twice along one axis has another class of placement for it.
            if not placement.is_replicate() and not placement.is_partial():
                parts *= tensor.device_mesh.size(axis)
    return parts
