"""What the loop, the evaluation and the worker ask of a model that is trained, however it lies on the ranks."""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tandem.checkpoint.tensors import ExportTensor
from tandem.train.parallel.mesh import Mesh
from tandem.train.precision import LossScaler
from tandem.train.stage import ShardSequence

if TYPE_CHECKING:
    from tandem.train.parallel.pipeline import Pipeline


class ParallelModel(nn.Module, abc.ABC):
    """A causal LM as one rank holds it: laid out by `parallelize.parallelize`, or by DeepSpeed."""

    mesh: Mesh
    shard_sequence: ShardSequence
    """Cuts this rank's part out of a sequence."""
    pipeline: Pipeline | None
    """Runs micro-batches, if layers are cut into stages; the model itself cannot be called then."""

    @property
    @abc.abstractmethod
    def whole(self) -> nn.Module:
        """The transformers or peft model, with what this rank has of it, under the names that checkpoints have."""

    @property
    @abc.abstractmethod
    def sharded(self) -> bool:
        """Whether what holds the parameters casts them to the computing type; else autocast does it."""

    @abc.abstractmethod
    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """Token ids and positions (B, T), whole, to `.logits` (B, T or this rank's part of it, V or a DTensor cut along it)."""

    @abc.abstractmethod
    def gradients_synced(self, sync: bool) -> AbstractContextManager[None]:
        """Exchange gradients in this backward pass only if `sync`: once a step, with the last micro-batch."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""

    @abc.abstractmethod
    def finish_gradients(self) -> None:
        """What is left to exchange after the last backward pass of a step."""

    @abc.abstractmethod
    def step(self, optimizer: Optimizer, limit: float, scaler: LossScaler | None, loss: Tensor) -> tuple[float, bool]:
        """Clip gradients to a global norm of `limit` (0: leave them), take a step, and forget them.

        Returns the norm before clipping, over the whole mesh, and whether the step was taken: not if it, or this step's `loss` on
        any rank, is not finite. Every rank decides alike.
        """

    @abc.abstractmethod
    def training_state(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """This rank's part of the trained weights (`model`) and of the optimizer's state (`optimizer`), to save or to load into.

        Names and shapes are those of the plain model, so that any layout reads what another has written.
        """

    @abc.abstractmethod
    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Optimizer) -> None:
        """Go on from what was loaded into a `training_state`."""

    @abc.abstractmethod
    def weights(self) -> list[ExportTensor]:
        """What this rank has of all weights, or of a peft model of those that are trained, to be made whole one by one.

        Names and shapes are those of the plain model.
        """

    def close(self) -> None:
        """Let go of what is kept outside of memory. Every rank calls it, when all are done."""
