"""Interface of a model that is distributed over ranks, for loop, evaluation, checkpoints and export."""

from __future__ import annotations

import abc
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tandem.checkpoint.tensors import ExportTensor
from tandem.train.model.precision import LossScaler
from tandem.train.model.stage import ShardSequence
from tandem.train.parallel.mesh import Mesh

if TYPE_CHECKING:
    from tandem.train.parallel.pipeline import Pipeline


class ParallelModel(nn.Module, abc.ABC):
    """A causal LM on one rank: distributed by `parallelize.parallelize`, or by DeepSpeed."""

    mesh: Mesh
    shard_sequence: ShardSequence
    """Selects this rank's part of a sequence."""
    pipeline: Pipeline | None
    """Runs micro-batches under pipeline parallelism; the model itself cannot be called then."""

    @property
    @abc.abstractmethod
    def whole(self) -> nn.Module:
        """The transformers or peft model with this rank's part of the parameters, under the names of checkpoints."""

    @property
    @abc.abstractmethod
    def sharded(self) -> bool:
        """Whether FSDP2 casts the parameters to the compute type; otherwise autocast does."""

    @abc.abstractmethod
    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> Any:
        """Token ids and positions (B, T) of whole sequences to `.logits` (B, this rank's T, V), or a DTensor sharded on V."""

    @abc.abstractmethod
    def gradients_synced(self, sync: bool) -> AbstractContextManager[None]:
        """Reduce gradients in this backward pass only if `sync`: once a step, with the last micro-batch."""

    @abc.abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""

    @abc.abstractmethod
    def finish_gradients(self) -> None:
        """Reduce gradients that are left after the last backward pass of a step."""

    @abc.abstractmethod
    def step(self, optimizer: Optimizer, limit: float, scaler: LossScaler | None, loss: Tensor) -> tuple[float, bool]:
        """Clip gradients to a global norm of `limit` (0: no clipping), take a step, and clear the gradients.

        Returns the norm before clipping, over the whole mesh, and whether the step was taken: it is skipped, on every rank, if
        the norm or the `loss` of any rank is not finite.
        """

    @abc.abstractmethod
    def training_state(self, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
        """This rank's part of the trained weights (`model`) and of the optimizer's state (`optimizer`), to save or to load into.

        Names and shapes are those of the plain model, so that any layout can load a checkpoint of any other.
        """

    @abc.abstractmethod
    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Optimizer) -> None:
        """Restore what was loaded into a `training_state`."""

    @abc.abstractmethod
    def weights(self) -> list[ExportTensor]:
        """This rank's part of all weights, or of a peft model's trained weights, to be gathered one by one.

        Names and shapes are those of the plain model.
        """

    def close(self) -> None:
        """Free resources outside of memory. Every rank calls it at the end."""
