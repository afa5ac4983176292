"""Checkpoint saves that are retried while the storage refuses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.stateful import Stateful

from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints
from tandem.errors import StorageError
from tandem.storage import Location
from tandem.train.parallel.model import ParallelModel
from tandem.train.storage_retry import retry_storage


class RetryingCheckpoints:
    """The checkpoints of a run. Every rank makes one, and calls the same methods at the same steps."""

    def __init__(self, checkpoints: Checkpoints, *, limit_s: float, notify: Callable[[str], None]) -> None:
        """`limit_s`: seconds over which a save is retried. `notify` gets one message when a save is refused."""
        self._checkpoints, self._limit_s, self._notify = checkpoints, limit_s, notify
        self._refused = False

    def load(
        self, model: ParallelModel, optimizer: torch.optim.Optimizer, *, extra: Mapping[str, Stateful]
    ) -> tuple[SavedState | None, list[str]]:
        """See `Checkpoints.load`."""
        return self._checkpoints.load(model, optimizer, extra=extra)

    def load_from(
        self,
        checkpoint: Location,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        *,
        extra: Mapping[str, Stateful],
    ) -> SavedState:
        """See `Checkpoints.load_from`."""
        return self._checkpoints.load_from(checkpoint, model, optimizer, extra=extra)

    def save(
        self,
        model: ParallelModel,
        optimizer: torch.optim.Optimizer,
        state: SavedState,
        *,
        extra: Mapping[str, Stateful],
        on_commit: Callable[[Location], None],
    ) -> None:
        """See `Checkpoints.save`; StorageError, on every rank, only once `limit_s` is over."""

        def write() -> None:
            try:
                self._checkpoints.save(model, optimizer, state, extra=extra, on_commit=on_commit)
                if self._refused:
                    # A background write reports its failure when the next one begins: too late for two in a row.
                    self._checkpoints.wait()
            except StorageError:
                self._refused = True
                raise
            self._refused = False

        root = self._checkpoints.root
        retry_storage(
            write,
            limit_s=self._limit_s,
            give_up=lambda: isinstance(root, Path) and root.is_file(),
            notify=self._notify,
        )

    def wait(self) -> None:
        """Return when the last save is complete; StorageError, on every rank, if it failed."""
        try:
            self._checkpoints.wait()
        except StorageError:
            self._refused = True
            raise
