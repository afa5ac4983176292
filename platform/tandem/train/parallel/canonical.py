"""Canonical tensors: names and shapes of the plain transformers model, which checkpoints hold for every layout.

Two things differ in some layouts. Expert-parallel weights are held as (E, 2, I, H), where transformers has (E, 2I, H), so that
splitting I splits gate and up alike. A tied embedding of a pipeline exists twice, in the first and in the last stage; it is saved
once, under the name of the embedding, and loaded into both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tandem.checkpoint.chunks import ChunkedTensor, local_chunk
from tandem.train.model.build import unwrapped
from tandem.train.parallel.expert import ParallelExperts
from tandem.train.parallel.pipeline import causal_lm


def canonical(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, ChunkedTensor]:
    """This rank's chunks of `tensors`, by canonical name, sharing memory; the keys are parameter names of `model`.

    The tensors are parameters, or have their shapes: averages, and optimizer state.
    """
    experts = expert_parameter_names(model)
    chunked: dict[str, ChunkedTensor] = {}
    for name, tensor in tensors.items():
        plain_name = canonical_name(model, name)
        if plain_name not in chunked:
            chunked[plain_name] = (
                _fused_experts(tensor) if name in experts and tensor.ndim == 4 else ChunkedTensor.of(tensor)
            )
    return chunked


@torch.no_grad()
def sync_tied(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """After loading into `canonical(model, held)`: copy a tied embedding from its first copy on this rank to the second."""
    first_copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first_copy = first_copies.setdefault(canonical_name(model, name), tensor)
        if first_copy is not tensor:
            local_chunk(tensor)[1].copy_(local_chunk(first_copy)[1])


def canonical_name(model: nn.Module, name: str) -> str:
    """The name of a parameter in the plain model: a tied output embedding has the name of the input embedding."""
    lm = causal_lm(unwrapped(model))
    if not getattr(getattr(lm, "config", None), "tie_word_embeddings", False) or not name.endswith("lm_head.weight"):
        return name
    return name.removesuffix("lm_head.weight") + "model.embed_tokens.weight"


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent buffers of a model, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are held as (E, 2, I, H)."""
    modules = unwrapped(model).named_modules()
    return {f"{name}.gate_up_proj" for name, module in modules if isinstance(module, ParallelExperts)}


def _fused_experts(tensor: Tensor) -> ChunkedTensor:
    """Experts (E, 2, I, H) as chunks of (E, 2I, H): one of the gate and one of the up projection."""
    experts, _, width, hidden = tensor.shape
    (expert, _, row, column), local = local_chunk(tensor)
    chunks = (
        (((expert, projection * width + row, column), local[:, projection]) for projection in (0, 1))
        if local.numel()
        else ()
    )
    return ChunkedTensor(local, (experts, 2 * width, hidden), chunks)
