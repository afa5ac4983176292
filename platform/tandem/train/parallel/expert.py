"""Expert parallelism: the experts of a mixture are distributed over ranks, and tokens reach them by all-to-all.

It works on transformers' stacked experts (`gate_up_proj` (E, 2I, H), `down_proj` (E, H, I)), as in Qwen3-MoE and Mixtral.
Expert-parallel ranks see different rows, so the gradient of an expert already sums the tokens of all of them. Under tensor
parallelism the inner width of each expert is split, too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def split_experts(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Replace every stack of experts in `model` by this rank's part over the mesh axes ep and tp; returns the new modules."""
    replaced: list[nn.Module] = []
    if mesh.size() == 1:
        return replaced
    for parent in list(model.modules()):
        experts = getattr(parent, "experts", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "gate_up_proj"):
            parent.experts = ParallelExperts(experts, mesh)
            replaced.append(parent.experts)
    return replaced


class ParallelExperts(nn.Module):
    """This rank's experts, and the routing of tokens to the ranks of their experts. Axis ep splits experts, tp their width."""

    def __init__(self, experts: Any, mesh: DeviceMesh) -> None:
        super().__init__()
        ep, tp = mesh["ep"], mesh["tp"]
        self.num_experts = experts.num_experts
        self._ep = ep.get_group() if ep.size() > 1 else None
        self._tp = tp.get_group() if tp.size() > 1 else None
        self._ranks, self._experts_per_rank = ep.size(), self.num_experts // ep.size()
        self.act_fn = experts.act_fn
        width = experts.down_proj.shape[2]
        # (E, 2, I, H): gate and up on an axis of their own, so that splitting I splits both.
        gate_up = experts.gate_up_proj.detach().unflatten(1, (2, width))
        for name, weight, width_axis in (("gate_up_proj", gate_up, 2), ("down_proj", experts.down_proj.detach(), 2)):
            local_weight = weight.chunk(ep.size(), 0)[ep.get_local_rank()].chunk(tp.size(), width_axis)[
                tp.get_local_rank()
            ]
            axes = {"ep": Shard(0), "tp": Shard(width_axis)}
            split_axes = [axis for axis in axes if mesh[axis].size() > 1]
            submesh = mesh if len(split_axes) == 2 else mesh[split_axes[0]]
            sharded = DTensor.from_local(
                local_weight.contiguous(), submesh, [axes[axis] for axis in split_axes], run_check=False
            )
            self.register_parameter(name, nn.Parameter(sharded, requires_grad=getattr(experts, name).requires_grad))

    def forward(self, hidden_NH: Tensor, expert_ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The weighted sum of each token's experts: hidden states (N, H), expert numbers and weights (N, K)."""
        if self._tp is not None:
            # Each tensor-parallel rank has a part of every expert, and so computes a part of the gradient.
            hidden_NH, weights_NK = _sum_gradient(hidden_NH, self._tp), _sum_gradient(weights_NK, self._tp)
        experts_per_token = expert_ids_NK.shape[1]
        expert_order = expert_ids_NK.flatten().argsort(stable=True)
        token_ids = expert_order // experts_per_token
        counts = torch.bincount(expert_ids_NK.flatten(), minlength=self.num_experts)
        dispatched = hidden_NH[token_ids]
        if self._ep is None:
            outputs = self._compute(dispatched, counts)
        else:
            received_counts = torch.empty_like(counts)
            dist.all_to_all_single(received_counts, counts, group=self._ep)
            send_counts = counts.view(self._ranks, -1).sum(1).tolist()
            receive_counts = received_counts.view(self._ranks, -1).sum(1).tolist()
            received = _exchange(dispatched, send_counts, receive_counts, self._ep)
            # Received tokens are sorted by rank, then by expert; the experts compute on tokens sorted by expert, then by rank.
            expert = (
                torch.arange(self._experts_per_rank, device=received_counts.device)
                .repeat(self._ranks)
                .repeat_interleave(received_counts)
            )
            order = expert.argsort(stable=True)
            expert_outputs = self._compute(received[order], received_counts.view(self._ranks, -1).sum(0))
            outputs = _exchange(expert_outputs[order.argsort()], receive_counts, send_counts, self._ep)
        outputs = outputs * weights_NK.flatten()[expert_order, None].to(outputs.dtype)
        result = torch.zeros_like(hidden_NH).index_add(0, token_ids, outputs)
        return cast(Tensor, _sum(result, self._tp)) if self._tp is not None else result

    def _compute(self, tokens: Tensor, counts: Tensor) -> Tensor:
        gate_up, down = _local(self.gate_up_proj).flatten(1, 2), _local(self.down_proj)
        outputs = []
        for number, part in enumerate(tokens.split(counts.tolist())):
            gate, up = nn.functional.linear(part, gate_up[number]).chunk(2, dim=-1)
            outputs.append(nn.functional.linear(self.act_fn(gate) * up, down[number]))
        return torch.cat(outputs)


def _local(tensor: Any) -> Tensor:
    return cast(Tensor, tensor.to_local())


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; backward sends gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send_counts, ctx.receive_counts, ctx.group = send_counts, receive_counts, group
        return _all_to_all(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradients[0], ctx.receive_counts, ctx.send_counts, ctx.group), None, None, None


def _all_to_all(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(receive_counts), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), receive_counts, send_counts, group=group)
    return result


class _Sum(torch.autograd.Function):
    """All-reduce in forward; identity in backward."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumGradient(torch.autograd.Function):
    """Identity in forward; all-reduce of the gradient in backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


# autograd's functions have no types of their own.
_exchange: Any = _Exchange.apply
_sum: Any = _Sum.apply
_sum_gradient: Any = _SumGradient.apply
