"""Tensors by the names and shapes that they have in the plain transformers model: what checkpoints hold, in any layout.

Two things differ in some layouts. Experts that are shared are held as (E, 2, I, H), where transformers has (E, 2I, H), so that a
cut of I is one of gate and up alike. A tied embedding that a pipeline's first stage reads with and its last one writes with is
there twice; it is saved once, under the embedding's name, and read into both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tandem.checkpoint.chunks import ChunkedTensor, local_chunk
from tandem.train.model import unwrapped
from tandem.train.parallel.expert import ParallelExperts
from tandem.train.parallel.pipeline import causal_lm


def canonical(model: nn.Module, held: Mapping[str, Tensor]) -> dict[str, ChunkedTensor]:
    """What this rank has of the tensors `held`, sharing their memory; `held` has the parameters' names in `model`.

    They are parameters, or of their shapes: averages, and an optimizer's state.
    """
    experts = expert_parameter_names(model)
    found: dict[str, ChunkedTensor] = {}
    for name, tensor in held.items():
        known = canonical_name(model, name)
        if known not in found:
            found[known] = _stacked(tensor) if name in experts and tensor.ndim == 4 else ChunkedTensor.of(tensor)
    return found


@torch.no_grad()
def sync_tied(model: nn.Module, held: Mapping[str, Tensor]) -> None:
    """To be called after loading into `canonical(model, held)`: gives a second copy that this rank has what the first one got."""
    first: dict[str, Tensor] = {}
    for name, tensor in held.items():
        found = first.setdefault(canonical_name(model, name), tensor)
        if found is not tensor:
            local_chunk(tensor)[1].copy_(local_chunk(found)[1])


def canonical_name(model: nn.Module, name: str) -> str:
    """A parameter's name in the plain model: a tied output embedding has that of the input's."""
    lm = causal_lm(unwrapped(model))
    if not getattr(getattr(lm, "config", None), "tie_word_embeddings", False) or not name.endswith("lm_head.weight"):
        return name
    return name.removesuffix("lm_head.weight") + "model.embed_tokens.weight"


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a model's state, by name."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names of parameters that are held as (E, 2, I, H)."""
    modules = unwrapped(model).named_modules()
    return {f"{name}.gate_up_proj" for name, module in modules if isinstance(module, ParallelExperts)}


def _stacked(tensor: Tensor) -> ChunkedTensor:
    """Experts (E, 2, I, H) as parts of (E, 2I, H): a box of gate and up is one of each."""
    experts, _, width, hidden = tensor.shape
    (expert, _, inner, at), local = local_chunk(tensor)
    boxes = (((expert, which * width + inner, at), local[:, which]) for which in (0, 1)) if local.numel() else ()
    return ChunkedTensor(local, (experts, 2 * width, hidden), boxes)
