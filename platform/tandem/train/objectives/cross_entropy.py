"""Cross-entropy that never holds the logits in float32: with a vocabulary of 128k they would be the largest thing in memory.

Logits are read a few rows at a time, in float32 for those rows; what is kept for the backward pass is one number a row. Of a
step's peak that leaves the logits and their gradient, in the type they come in. On a CPU rows that fit the cache make it twice
as fast as torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tandem.data.packing import IGNORED

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
"""Logits read at a time: a megabyte for a cache, or enough of them to fill a GPU (256 MiB in float32)."""


def chunked_cross_entropy(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """Sum over rows of -log softmax(logits)[wanted] (nats, float32 scalar); rows that want IGNORED count nothing."""
    function: Any = _ChunkedCrossEntropy
    total: Tensor = function.apply(logits_NV, wanted_N)
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        counted, places = wanted != IGNORED, wanted.clamp(min=0)
        sums = torch.cat([piece.float().logsumexp(-1) for piece in logits.split(_rows_per_chunk(logits))])
        ctx.save_for_backward(logits, places, counted, sums)
        found = logits.gather(1, places[:, None]).squeeze(1).float()
        return (sums - found).masked_fill(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, places, counted, sums = ctx.saved_tensors
        rows = _rows_per_chunk(logits)
        result = torch.empty_like(logits)
        scales = counted * gradients[0]
        parts = (t.split(rows) for t in (result, logits, places, scales, sums))
        for target, piece, place, scale, total in zip(*parts, strict=True):
            # softmax, less 1 where the wanted token is
            slope = torch.sub(piece.float(), total[:, None]).exp_()
            slope.scatter_add_(1, place[:, None], slope.new_full((len(place), 1), -1))
            target.copy_(slope.mul_(scale[:, None]))
        return result, None


def _rows_per_chunk(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS.get(logits.device.type, CHUNK_ELEMENTS["cuda"]) // logits.shape[1])
