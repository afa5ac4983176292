"""Correction of vLLM's CPU build inside its workers, which import this as their `worker_extension_cls`.

Speculative decoding repeats each request's temperature, top-k and top-p for its speculated tokens. The function of vLLM 0.32 for
CPUs writes them into a copy and returns memory that was never written (vllm-project/vllm issue 55005): sampled requests got a
random temperature, and those with top-k ended the engine.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.triton_utils.dispatcher import register_kernels


class CpuWorkerExtension:
    """Empty: vLLM imports this module before it makes the worker, and the import applies the correction."""


def expand(output_T: Tensor, values_B: Tensor, ends_B: Tensor, old: float, new: float, MAX_NUM_TOKENS: int = 0) -> None:
    """Write each of B requests' values once for each of its tokens, of which `ends_B` is the running sum; `old` becomes `new`."""
    counts_B = torch.diff(ends_B.long(), prepend=ends_B.new_zeros(1, dtype=torch.long))
    replaced_B = torch.where(values_B == old, torch.full_like(values_B, new), values_B)
    output_T.copy_(replaced_B.repeat_interleave(counts_B))


register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand})
