"""Context parallelism: each rank computes the queries of its part of a sequence against all keys.

Keys and values are all-gathered before attention, and their gradients reduced afterwards, as in the training of Llama 3 (Dubey et
al. 2024), so that any document mask works. A rank takes one chunk from the front and one from the back of a sequence: under a
causal mask, late queries attend to more keys than early ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

ATTENTION = "tandem_context"
"""Name of the attention function in transformers' table."""


class SequenceSharder:
    """Selects a rank's part of the last axis of a tensor, and restores the order of gathered parts."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self._size, self._rank = mesh.size(), mesh.get_local_rank()

    def __call__(self, tensor: Tensor) -> Tensor:
        """This rank's two chunks of the last axis, whose length must be a multiple of 2 x ranks."""
        return tensor.index_select(-1, self._positions(tensor.shape[-1], self._rank, tensor.device))

    def order(self, length: int, device: torch.device) -> Tensor:
        """The permutation that restores the sequence: `gathered[order]` is in sequence order."""
        positions = torch.cat([self._positions(length, rank, device) for rank in range(self._size)])
        return torch.argsort(positions)

    def _positions(self, length: int, rank: int, device: torch.device) -> Tensor:
        chunk = length // (2 * self._size)
        front, back = rank * chunk, (2 * self._size - 1 - rank) * chunk
        return torch.cat([torch.arange(front, front + chunk), torch.arange(back, back + chunk)]).to(device)


def shard_sequences(model: Any, mesh: DeviceMesh) -> SequenceSharder:
    """Make a transformers model attend across `mesh`; returns the function that shards its inputs."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sharder = SequenceSharder(mesh)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        order = sharder.order(attention_mask.shape[-1], key.device)
        key, value = (_gathered(t, mesh.get_group()).index_select(2, order) for t in (key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend
    model.config._attn_implementation = ATTENTION
    return sharder


class _Gather(torch.autograd.Function):
    """All-gather along the sequence (axis 2), rank by rank; backward reduces each part's gradient to its rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # An all-reduce, of which the rank keeps its part: gloo does not reduce-scatter every type.
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size(), dim=2)[ctx.group.rank()].contiguous(), None


# autograd's functions have no types of their own.
_gathered: Any = _Gather.apply
