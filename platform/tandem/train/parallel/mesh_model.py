"""Causal LM on a device mesh: gradient synchronization, clipping, optimizer steps, and access to its state and weights."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from tandem.checkpoint.chunks import ChunkedTensor
from tandem.checkpoint.tensors import ExportTensor
from tandem.config.training.layout import STAGES_PER_RANK
from tandem.train.model.build import reshard
from tandem.train.model.precision import LossScaler
from tandem.train.model.stage import ShardSequence
from tandem.train.optimizer import start_state
from tandem.train.parallel.canonical import (
    canonical,
    canonical_name,
    expert_parameter_names,
    persistent_buffers,
    sync_tied,
)
from tandem.train.parallel.fsdp import is_sharded, set_gradient_sync
from tandem.train.parallel.mesh import Mesh
from tandem.train.parallel.model import ParallelModel
from tandem.train.parallel.pipeline import Pipeline, causal_lm


class MeshModel(ParallelModel):
    """A causal LM on one rank of a device mesh, under FSDP2 or DDP. Without a pipeline it is called like a transformers model."""

    _whole: nn.Module
    _forward_module: nn.Module

    def __init__(
        self,
        whole: nn.Module,
        stages: Sequence[nn.Module],
        *,
        mesh: Mesh,
        shard_sequence: ShardSequence,
        pipeline: Pipeline | None,
        replicated: bool,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.mesh = mesh
        self.shard_sequence = shard_sequence
        self.pipeline = pipeline
        self._device = device
        # Not a submodule: its parameters belong to the stages. It has them under the names of checkpoints and exports.
        object.__setattr__(self, "_whole", whole)
        module: nn.Module = stages[0]
        if replicated:
            group = mesh["dp_replicate"].get_group()
            module = DistributedDataParallel(
                module, process_group=group, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
        object.__setattr__(self, "_forward_module", module)
        self._tied = TiedEmbeddings.of(self)

    @property
    def whole(self) -> nn.Module:
        """See `ParallelModel`."""
        return self._whole

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """See `ParallelModel`."""
        return SimpleNamespace(logits=self._forward_module(input_ids, position_ids))

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the parameters."""
        return is_sharded(self.stages[0])

    @contextlib.contextmanager
    def gradients_synced(self, sync: bool) -> Iterator[None]:
        """See `ParallelModel`."""
        if isinstance(self._forward_module, DistributedDataParallel) and not sync:
            with self._forward_module.no_sync():
                yield
            return
        set_gradient_sync(self, sync)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `ParallelModel`."""
        loss.backward()

    def step(self, optimizer: Optimizer, limit: float, scaler: LossScaler | None, loss: Tensor) -> tuple[float, bool]:
        """See `ParallelModel`."""
        if scaler:
            scaler.unscale(p.grad for p in self.parameters() if p.grad is not None)
        norm = self.clip(limit, loss)
        accepted = scaler.accept(norm) if scaler else math.isfinite(norm)
        if accepted:
            optimizer.step()
        optimizer.zero_grad()
        return norm, accepted

    def finish_gradients(self) -> None:
        """See `ParallelModel`."""
        if self._tied is not None:
            self._tied.sum_gradients(self._device)

    def training_state(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """See `ParallelModel`. It shares memory with the model and the optimizer."""
        reshard(self)
        start_state(optimizer)
        state: dict[str, ChunkedTensor] = {}
        for key, tensors in self._optimizer_state(optimizer).items():
            state |= {f"{name}.{key}": part for name, part in canonical(self.whole, tensors).items()}
        return {"model": canonical(self.whole, self._saved_tensors()), "optimizer": dict(state)}

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Optimizer) -> None:
        """See `ParallelModel`. Loading wrote into the parameters; the second copy of a tied embedding follows."""
        for tensors in (self._saved_tensors(), *self._optimizer_state(optimizer).values()):
            sync_tied(self.whole, tensors)

    def _saved_tensors(self) -> dict[str, Tensor]:
        trainable = {name: p for name, p in self.whole.named_parameters() if p.requires_grad}
        return {**trainable, **dict(persistent_buffers(self.whole))}

    def _optimizer_state(self, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
        """Optimizer state by key (exp_avg, ...), then by parameter name."""
        state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.whole.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                state.setdefault(key, {})[name] = value
        return state

    def weights(self) -> list[ExportTensor]:
        """See `ParallelModel`."""
        reshard(self)
        adapters = hasattr(self.whole, "peft_config")
        tensors: dict[str, Tensor] = {n: p for n, p in self.whole.named_parameters() if p.requires_grad or not adapters}
        if not adapters:
            tensors |= dict(persistent_buffers(self.whole))
        # The stage with the first copy of a tied embedding exports it.
        experts = expert_parameter_names(self.whole)
        return [
            _export_tensor(name, t, name in experts)
            for name, t in tensors.items()
            if canonical_name(self.whole, name) == name
        ]

    def clip(self, limit: float, loss: Tensor | None = None) -> float:
        """Scale gradients down to a global norm of `limit` (0: no clipping); returns the norm before, over the whole mesh.

        It is not a number if `loss` is not finite on any rank.
        """
        parameters = [p for p in self.parameters() if p.grad is not None and not (self._tied and self._tied.repeats(p))]
        ranks = dist.get_world_size() // self.mesh.degrees.pp if dist.is_initialized() else 1
        squares = torch.zeros((), dtype=torch.float64, device=next(self.parameters()).device)
        for parameter in parameters:
            # Norms of rows in float32, their sum in float64: a float64 norm of a whole matrix is far slower. Nothing waits for
            # the device. Ranks that hold the same shard count it once between them.
            rows = torch.linalg.vector_norm(_local(parameter.grad), dim=-1).double()
            squares += rows.square().sum() * (_shards(parameter.grad) / ranks)
        if loss is not None:
            # Adds 0, or NaN if the loss is not finite: the all-reduce then makes it NaN on all ranks.
            squares += loss.detach().to(squares) * 0
        if dist.is_initialized():
            squares = squares.to(self._device)
            dist.all_reduce(squares)
        norm = float(squares.sqrt())
        if limit:
            scale = min(1.0, limit / (norm + 1e-6))
            torch._foreach_mul_([_local(p.grad) for p in self.parameters() if p.grad is not None], scale)
        return norm


class TiedEmbeddings:
    """A tied embedding of a pipeline: the first stage's copy and the last stage's, which get equal gradients."""

    def __init__(
        self, copies: list[nn.Parameter], second_copy: nn.Parameter | None, group: dist.ProcessGroup | None
    ) -> None:
        self._copies, self._second_copy, self._group = copies, second_copy, group

    @classmethod
    def of(cls, model: MeshModel) -> TiedEmbeddings | None:
        """This rank's copies; None without a pipeline or a tied embedding. Every rank calls it: it makes process groups."""
        lm = causal_lm(model.whole)
        mesh, pipeline = model.mesh, model.pipeline
        if pipeline is None or not lm.config.tie_word_embeddings:
            return None
        group = None
        if STAGES_PER_RANK[pipeline.name] == 1 or pipeline.name == "interleaved":
            for column in mesh.device_mesh.mesh.reshape(mesh.degrees.pp, -1).T.tolist():
                new_group = dist.new_group([column[0], column[-1]])
                if dist.get_rank() in (column[0], column[-1]):
                    group = new_group
        first = lm.model.embed_tokens.weight if lm.model.embed_tokens is not None else None
        last = lm.lm_head.weight if lm.lm_head is not None else None
        return cls([p for p in (first, last) if p is not None], last, group)

    def repeats(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter is the second copy, which does not count for the gradient norm."""
        return parameter is self._second_copy

    def sum_gradients(self, device: torch.device) -> None:
        """Give both copies the sum of their gradients."""
        gradients = [_local(p.grad) for p in self._copies if p.grad is not None]
        if self._group is not None:
            for gradient in gradients:
                # The gradient may be offloaded to the CPU.
                device_gradient = gradient.to(device)
                dist.all_reduce(device_gradient, group=self._group)
                gradient.copy_(device_gradient)
        elif len(gradients) == 2:
            total = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(total)


def _export_tensor(name: str, tensor: Tensor, expert_parameter_names: bool) -> ExportTensor:
    shape = tuple(tensor.shape)
    if expert_parameter_names:
        shape = (shape[0], shape[1] * shape[2], shape[3])

    @torch.no_grad()
    def gather() -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        return full.view(shape)

    return ExportTensor(name=name, shape=shape, dtype=tensor.dtype, gather=gather)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _shards(tensor: Any) -> int:
    """Number of shards of a gradient over the ranks of a stage."""
    parts = 1
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            # Not `isinstance(placement, Shard)`: a tensor axis that is sharded twice has another class of placement.
            if not placement.is_replicate() and not placement.is_partial():
                parts *= tensor.device_mesh.size(axis)
    return parts
