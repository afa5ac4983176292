"""Model FLOPs utilization (MFU): operations of a training token, relative to the peak of the devices.

A token costs 6 N + 12 L h s floating-point operations (Chowdhery et al. 2022, PaLM, appendix B): N parameters in
matmuls for that token, L layers whose attention is h wide (heads x head width), s tokens in a row. Recomputed activations
do not count, and neither the causal mask nor documents reduce it: the common formula, so that numbers compare. A frozen parameter
has no gradient, which leaves 4 of its 6.

The peak of a GPU is its data sheet's for dense bfloat16 matmuls, whatever the precision of the job. For a CPU, and for a GPU that
is not in the table, the worker measures it with a short matmul on its own threads.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tandem.train.adapters.quantize import count_weights

PEAK_BF16_FLOPS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A40": 150e12,
    "A10": 125e12,
}
"""FLOP/s by words of the device name, without sparsity (NVIDIA's data sheets). More specific names come first."""


def flops_per_token(
    *, active_parameters: int, trained_parameters: int, num_layers: int, attention_width: int, sequence_length: int
) -> float:
    """Floating-point operations of one token, forward and backward.

    `active_parameters` take part in a matmul for the token; `trained_parameters` of these get a gradient.
    """
    return (
        4.0 * active_parameters
        + 2.0 * min(trained_parameters, active_parameters)
        + 12.0 * num_layers * attention_width * sequence_length
    )


def active_parameters(named_sizes: Iterable[tuple[str, int]], model_config: Any) -> int:
    """Number of parameters in a token's matmuls: `named_sizes` are the names and sizes of all parameters.

    `model_config` is a transformers config. A token uses `num_experts_per_tok` of a mixture's experts; an embedding counts only
    if it is tied to the output layer.
    """
    text_config = _text_config(model_config)
    tied = bool(getattr(text_config, "tie_word_embeddings", False))
    experts = getattr(text_config, "num_experts", None) or getattr(text_config, "num_local_experts", None) or 0
    experts_per_token = getattr(text_config, "num_experts_per_tok", None) or experts
    total = 0.0
    for name, size in named_sizes:
        parts = name.split(".")
        if "embed_tokens" in parts and not tied:
            continue
        total += size * experts_per_token / experts if experts and "experts" in parts else size
    return round(total)


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 peak of a GPU by its name (`NVIDIA H100 80GB HBM3`), in FLOP/s; None for an unknown one."""
    words = set(device_name.replace("-", " ").split())
    return next((peak for device, peak in PEAK_BF16_FLOPS.items() if set(device.split()) <= words), None)


def measured_flops(device: torch.device, precision: torch.dtype, *, size: int = 512, seconds: float = 0.1) -> float:
    """FLOP/s of square matmuls on a device: the best of at least three, and of as many as fit in `seconds`."""
    matrix = torch.rand(size, size, device=device).to(precision)
    best_s, repetitions, start_time = float("inf"), 0, time.perf_counter()
    while repetitions < 3 or time.perf_counter() - start_time < seconds:
        repetition_start = time.perf_counter()
        result = matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - repetition_start)
        repetitions += 1
    del result
    return 2.0 * size**3 / best_s


def memory_peak_bytes(device: torch.device) -> int:
    """Peak memory so far: reserved by PyTorch's allocator on a GPU; of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Utilization:
    """Use of one worker's device."""

    mfu: float
    """Model FLOPs utilization, 0 to 1."""
    memory_bytes: int
    """Peak so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MfuMeter:
    """Measures the utilization of one worker's device."""

    token_flops: float
    device: torch.device
    peak: float
    """FLOP/s of all workers' devices together."""

    @classmethod
    def of(
        cls, model: nn.Module, *, device: torch.device, workers: int, sequence_length: int, precision: str
    ) -> MfuMeter:
        """The meter of a model before it is sharded, trained on `workers` devices like this one."""
        text_config = _text_config(model.config)
        parameters = list(model.named_parameters())
        heads = text_config.num_attention_heads
        width = (getattr(text_config, "head_dim", None) or text_config.hidden_size // heads) * heads
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak is None:
            peak = measured_flops(
                device,
                torch.bfloat16 if precision == "bfloat16" else torch.float32,
                size=4096 if device.type == "cuda" else 512,
            )
        return cls(
            token_flops=flops_per_token(
                active_parameters=active_parameters(((n, count_weights(p)) for n, p in parameters), text_config),
                trained_parameters=active_parameters(
                    ((n, count_weights(p)) for n, p in parameters if p.requires_grad), text_config
                ),
                num_layers=text_config.num_hidden_layers,
                attention_width=width,
                sequence_length=sequence_length,
            ),
            device=device,
            peak=peak * workers,
        )

    def read(self, tokens_per_s: float) -> Utilization:
        """The utilization at a throughput of all workers."""
        mfu = self.token_flops * tokens_per_s / self.peak
        return Utilization(mfu=mfu, memory_bytes=memory_peak_bytes(self.device))


def _text_config(model_config: Any) -> Any:
    """The language model's part of a transformers config."""
    inner = getattr(model_config, "get_text_config", None)
    return inner() if callable(inner) else model_config
