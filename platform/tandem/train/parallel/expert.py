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
    made: list[nn.Module] = []
    if mesh.size() == 1:
        return made
    for parent in list(model.modules()):
        experts = getattr(parent, "experts", None)
        if isinstance(experts, nn.Module) and hasattr(experts, "gate_up_proj"):
            parent.experts = ParallelExperts(experts, mesh)
            made.append(parent.experts)
    return made


class ParallelExperts(nn.Module):
    """This rank's experts, and the routing of tokens to the ranks of their experts. Axis ep splits experts, tp their width."""

    def __init__(self, whole: Any, mesh: DeviceMesh) -> None:
        super().__init__()
        ep, tp = mesh["ep"], mesh["tp"]
        self.num_experts = whole.num_experts
        self._ep = ep.get_group() if ep.size() > 1 else None
        self._tp = tp.get_group() if tp.size() > 1 else None
        self._ranks, self._held = ep.size(), self.num_experts // ep.size()
        self.act_fn = whole.act_fn
        width = whole.down_proj.shape[2]
        # (E, 2, I, H): gate and up on an axis of their own, so that splitting I splits both.
        gate_up = whole.gate_up_proj.detach().unflatten(1, (2, width))
        for name, weight, inner in (("gate_up_proj", gate_up, 2), ("down_proj", whole.down_proj.detach(), 2)):
            mine = weight.chunk(ep.size(), 0)[ep.get_local_rank()].chunk(tp.size(), inner)[tp.get_local_rank()]
            axes = {"ep": Shard(0), "tp": Shard(inner)}
            cut = [axis for axis in axes if mesh[axis].size() > 1]
            over = mesh if len(cut) == 2 else mesh[cut[0]]
            sharded = DTensor.from_local(mine.contiguous(), over, [axes[axis] for axis in cut], run_check=False)
            self.register_parameter(name, nn.Parameter(sharded, requires_grad=getattr(whole, name).requires_grad))

    def forward(self, hidden_NH: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """The weighted sum of each token's experts: hidden states (N, H), expert numbers and weights (N, K)."""
        if self._tp is not None:
            # Each tensor-parallel rank has a part of every expert, and so computes a part of the gradient.
            hidden_NH, weights_NK = _sum_gradient(hidden_NH, self._tp), _sum_gradient(weights_NK, self._tp)
        top = chosen_NK.shape[1]
        by_expert = chosen_NK.flatten().argsort(stable=True)
        token = by_expert // top
        counts = torch.bincount(chosen_NK.flatten(), minlength=self.num_experts)
        sent = hidden_NH[token]
        if self._ep is None:
            done = self._compute(sent, counts)
        else:
            there = torch.empty_like(counts)
            dist.all_to_all_single(there, counts, group=self._ep)
            outgoing = counts.view(self._ranks, -1).sum(1).tolist()
            incoming = there.view(self._ranks, -1).sum(1).tolist()
            received = _exchanged(sent, outgoing, incoming, self._ep)
            # Received tokens are sorted by rank, then by expert; the experts compute on tokens sorted by expert, then by rank.
            expert = torch.arange(self._held, device=there.device).repeat(self._ranks).repeat_interleave(there)
            order = expert.argsort(stable=True)
            computed = self._compute(received[order], there.view(self._ranks, -1).sum(0))
            done = _exchanged(computed[order.argsort()], incoming, outgoing, self._ep)
        done = done * weights_NK.flatten()[by_expert, None].to(done.dtype)
        result = torch.zeros_like(hidden_NH).index_add(0, token, done)
        return cast(Tensor, _summed(result, self._tp)) if self._tp is not None else result

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
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
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
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


# autograd's functions have no types of their own.
_exchanged: Any = _Exchange.apply
_summed: Any = _Sum.apply
_sum_gradient: Any = _SumGradient.apply
