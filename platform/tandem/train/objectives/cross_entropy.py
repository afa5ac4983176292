"""Chunked cross-entropy: never holds all logits in float32, which a vocabulary of 128k makes the largest tensor in memory.

It converts a few rows of logits at a time to float32, and keeps one number for each row for the backward pass. At its peak a step
holds the logits and their gradient in their own type. On a CPU, chunks that fit the cache make it twice as fast as torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tandem.data.packing import IGNORED

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits in a chunk: 1 MiB in float32 for a CPU's cache, or enough to occupy a GPU (256 MiB in float32)."""


def chunked_cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[target] (nats, float32 scalar), without rows whose target is IGNORED."""
    function: Any = _ChunkedCrossEntropy
    total: Tensor = function.apply(logits_NV, target_N)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        is_target, indices = target != IGNORED, target.clamp(min=0)
        log_sums = torch.cat([chunk.float().logsumexp(-1) for chunk in logits.split(_rows_per_chunk(logits))])
        ctx.save_for_backward(logits, indices, is_target, log_sums)
        target_logits = logits.gather(1, indices[:, None]).squeeze(1).float()
        return (log_sums - target_logits).masked_fill(~is_target, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, indices, is_target, log_sums = ctx.saved_tensors
        rows = _rows_per_chunk(logits)
        result = torch.empty_like(logits)
        scales = is_target * gradients[0]
        parts = (t.split(rows) for t in (result, logits, indices, scales, log_sums))
        for gradient, chunk, index, scale, log_sum in zip(*parts, strict=True):
            # softmax, minus 1 at the target
            slope = torch.sub(chunk.float(), log_sum[:, None]).exp_()
            slope.scatter_add_(1, index[:, None], slope.new_full((len(index), 1), -1))
            gradient.copy_(slope.mul_(scale[:, None]))
        return result, None


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"]) // logits.shape[1])
