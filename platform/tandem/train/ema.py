"""Exponential moving average of the weights (Polyak and Juditsky 1992), used for evaluation and export.

Each rank averages its own shards, without communication.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tandem.train.model.build import reshard, unwrapped
from tandem.train.parallel.canonical import canonical, sync_tied


class Ema:
    """The average of a model's trained parameters, sharded as they are; takes as much memory as they do.

    In update n the decay is at most (1 + n) / (10 + n), so that the random initial weights lose their influence early.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._updates = 0
        self._average = {name: p.detach().clone() for name, p in _trainable_parameters(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after an optimizer step."""
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates))
        average, current = self._pairs(model)
        if average:
            torch._foreach_lerp_(average, current, 1 - decay)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Swap the average into the model for a `with` block; the weights are bit-identical afterwards."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def state_dict(self) -> dict[str, Any]:
        """For torch.distributed.checkpoint: the average by the plain model's names, sharing its memory."""
        return {"updates": self._updates, "average": canonical(self._model, self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of the same parameters, such as a `state_dict` that was loaded into in place."""
        self._updates = int(state["updates"])
        for name, own_tensor in canonical(self._model, self._average).items():
            for offsets, own_chunk in own_tensor.chunks.items():
                loaded_chunk = state["average"][name].chunks[offsets]
                if loaded_chunk.data_ptr() != own_chunk.data_ptr():
                    own_chunk.copy_(loaded_chunk)
        sync_tied(self._model, self._average)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        # After a forward pass without a backward pass, FSDP2 keeps some parameters gathered: they would be stale.
        reshard(model)
        for average, current in zip(*self._pairs(model), strict=True):
            previous = current.clone()
            current.copy_(average)
            average.copy_(previous)

    def _pairs(self, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        current = {name: p.detach() for name, p in _trainable_parameters(model)}
        return [_local(a) for a in self._average.values()], [_local(current[name]) for name in self._average]


def _trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in unwrapped(model).named_parameters() if p.requires_grad)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
