"""Sharded checkpoints by torch.distributed.checkpoint: each rank saves and loads its chunks, in one folder.

Only trained weights are saved: a LoRA run's checkpoint holds its adapters, not the base. Names and shapes are those of the plain
model, so that a run can resume in any other layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.checkpoint.stateful import Stateful

from tandem.checkpoint import folders
from tandem.checkpoint.chunks import ChunkedTensor
from tandem.checkpoint.files import CheckpointReader, CheckpointWriter
from tandem.checkpoint.folders import SavedState
from tandem.errors import CheckpointError, StorageError, TandemError
from tandem.storage import Location, disk_errors, free_bytes

_NOTHING: Mapping[str, Stateful] = {}


class TrainableModel(Protocol):
    """Interface of a model whose training state is saved."""

    def training_state(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """This rank's part of `model` and `optimizer`, by the plain model's names and shapes; loaded into in place."""
        ...

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        """Restore what was loaded into a `training_state`."""
        ...


class Checkpoints:
    """The checkpoints of one run: written in the background while training continues, and verified before they are loaded.

    Every rank makes one, and calls the same methods at the same steps. The background thread writes a copy in CPU memory, and
    communicates in a process group of its own, apart from training.
    """

    def __init__(self, root: Location, *, keep: int, best: str | None = None, asynchronous: bool = True) -> None:
        """`keep`: number of newest checkpoints to keep; `best`: a metric by which the best one is kept, too."""
        self.root, self._keep, self._best = root, keep, best
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._stager = _PinnedStager() if asynchronous else None
        self._running: Future[Any] | None = None

    def save(
        self,
        model: TrainableModel,
        optimizer: torch.optim.Optimizer,
        state: SavedState,
        *,
        extra: Mapping[str, Stateful] = _NOTHING,
        on_commit: Callable[[Location], None] = lambda checkpoint: None,
    ) -> None:
        """Begin to write a checkpoint, after the one before is complete. Without `asynchronous`, it is complete on return.

        `extra`: other objects with state by name, such as an average of the weights. `on_commit` is called on rank 0, with the
        folder, when it is complete: by the thread that writes, before `wait` returns. Raises StorageError, on every rank, if this
        checkpoint or the one before could not be written; earlier ones stay complete.
        """
        self.wait()
        writer = CheckpointWriter(self.root, state, lambda: folders.prune(self.root, self._keep, self._best), on_commit)
        content = _content(model, optimizer, extra)
        options: dict[str, Any] = {
            "storage_writer": writer, "process_group": self._group, "no_dist": self._group is None,
        }  # fmt: skip
        if self._stager is None:
            _write(self.root, lambda: save_state(content, **options))
            return
        running: Any = async_save(content, async_stager=self._stager, **options)
        self._running = running

    def wait(self) -> None:
        """Return when the checkpoint that is being written is complete; StorageError, on every rank, if it failed."""
        running, self._running = self._running, None
        if running is not None:
            _write(self.root, running.result)

    def load(
        self, model: TrainableModel, optimizer: torch.optim.Optimizer, *, extra: Mapping[str, Stateful] = _NOTHING
    ) -> tuple[SavedState | None, list[str]]:
        """Load the newest intact checkpoint, however the model is sharded now.

        Returns its state (None without one), and messages for the user about newer ones that are damaged or incomplete; damaged
        ones are quarantined. Raises CheckpointError if it belongs to another model.
        """
        rank, world = (dist.get_rank(), dist.get_world_size()) if self._group is not None else (0, 1)
        complete, incomplete = self._gather_from_ranks(
            lambda: (folders.list_complete(self.root), folders.list_incomplete(self.root)) if rank == 0 else None
        )[0]
        newest = folders.step_of(complete[-1]) if complete else -1
        messages = [
            f"{checkpoint} has no {folders.MANIFEST_NAME}: it was not written to its end, or has lost it. It is not used."
            for checkpoint in incomplete
            if folders.step_of(checkpoint) > newest
        ]
        for index, checkpoint in reversed(list(enumerate(complete))):
            parts = self._gather_from_ranks(lambda at=checkpoint: folders.find_damage(at, rank, world))
            if damage := [problem for part in parts for problem in part]:
                resume_point = (
                    f"step {folders.step_of(complete[index - 1])}" if index else "the start: there is none before"
                )
                messages.append(f"{checkpoint} is damaged: {'; '.join(damage)}. The run resumes from {resume_point}.")
                self._gather_from_ranks(lambda at=checkpoint: folders.quarantine(at) if rank == 0 else None)
                continue
            return load(checkpoint, model, optimizer, extra=extra, group=self._group), messages
        return None, messages

    def load_from(
        self,
        checkpoint: Location,
        model: TrainableModel,
        optimizer: torch.optim.Optimizer,
        *,
        extra: Mapping[str, Stateful] = _NOTHING,
    ) -> SavedState:
        """Load a checkpoint of another run, which stays as it is; CheckpointError if it is damaged or of another model."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if self._group is not None else (0, 1)
        parts = self._gather_from_ranks(lambda: folders.find_damage(checkpoint, rank, world))
        if damage := [problem for part in parts for problem in part]:
            raise CheckpointError(f"{checkpoint} is damaged: {'; '.join(damage)}. Extend another job, or train anew.")
        return load(checkpoint, model, optimizer, extra=extra, group=self._group)

    def _gather_from_ranks(self, read: Any) -> list[Any]:
        """The result of `read` on each rank; an error of one rank is raised on all, so that none waits for another."""
        own_result: tuple[Any, str | None]
        try:
            own_result = (read(), None)
        except Exception as error:  # noqa: BLE001 - a store's client has errors of its own
            own_result = (None, str(error) if isinstance(error, TandemError) else f"{type(error).__name__}: {error}")
        results: list[Any] = [own_result]
        if self._group is not None:
            results = [None] * dist.get_world_size()
            dist.all_gather_object(results, own_result, group=self._group)
        for _, problem in results:
            if problem is not None:
                raise StorageError(
                    f"Checkpoints below {self.root} cannot be read: {problem}. They are as they were; see that the disk or the "
                    "store answers, then run the same command again."
                )
        return [result for result, _ in results]


def save(
    root: Location,
    model: TrainableModel,
    optimizer: torch.optim.Optimizer,
    state: SavedState,
    *,
    keep: int,
    extra: Mapping[str, Stateful] = _NOTHING,
) -> Location:
    """Write one checkpoint below `root`; returns its folder when it is complete. See `Checkpoints.save`."""
    writer = CheckpointWriter(root, state, lambda: folders.prune(root, keep))
    content = _content(model, optimizer, extra)
    _write(root, lambda: save_state(content, storage_writer=writer, no_dist=not dist.is_initialized()))
    return folders.step_folder(root, state.step)


def load(
    checkpoint: Location,
    model: TrainableModel,
    optimizer: torch.optim.Optimizer,
    *,
    extra: Mapping[str, Stateful] = _NOTHING,
    group: Any = None,
) -> SavedState:
    """Load a checkpoint into `model`, `optimizer` and `extra`, however they are sharded now. Every rank calls it.

    `group`: the process group to communicate in. Raises CheckpointError if it is damaged or belongs to another model.
    """
    state = folders.read_state(checkpoint)
    content = _content(model, optimizer, extra)
    if (dist.get_rank() if dist.is_initialized() else 0) >= state.world:
        del content["random"]  # a rank that did not exist has no saved random state
    try:
        load_state(
            content, storage_reader=CheckpointReader(checkpoint), process_group=group, no_dist=not dist.is_initialized()
        )
        model.set_training_state(content, optimizer)
        for name, stateful in extra.items():
            stateful.load_state_dict(content[name])
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be loaded: {_root_cause(error)}. "
            "Remove it; the run then resumes from the previous one, or from the start."
        ) from error
    for random in content.get("random", {}).values():
        torch.set_rng_state(random)
    return state


def _content(model: TrainableModel, optimizer: torch.optim.Optimizer, extra: Mapping[str, Stateful]) -> dict[str, Any]:
    random = {f"cpu-{dist.get_rank() if dist.is_initialized() else 0}": torch.get_rng_state()}
    extra_state = {name: stateful.state_dict() for name, stateful in extra.items()}
    return {**model.training_state(optimizer), "random": random, **extra_state}


def _write(root: Location, result: Callable[[], Any]) -> None:
    """Wait until a checkpoint is complete; StorageError, on every rank, if it could not be written."""
    try:
        result()
    except (CheckpointException, TandemError, OSError, RuntimeError) as error:
        raise StorageError(_explain(error, root)) from error


class _PinnedStager(AsyncStager):
    """Copies the saved state into CPU memory, reusing the same buffers: a new allocation takes as long as the copy."""

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """See torch's."""
        staged: dict[str, Any] = self._copy(state_dict, ())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        """See torch's: `stage` waits for every copy."""
        return

    def close(self) -> None:
        """See torch's."""
        self._buffers.clear()

    def _copy(self, value: Any, key: tuple[Any, ...]) -> Any:
        if isinstance(value, ChunkedTensor):
            copies = [
                (tuple(offsets), self._copy_tensor(chunk, (*key, offsets))) for offsets, chunk in value.chunks.items()
            ]
            return ChunkedTensor(torch.empty((), dtype=value.dtype), value.shape, copies)
        if isinstance(value, Tensor):
            return self._copy_tensor(value, key)
        if isinstance(value, dict):
            return {name: self._copy(item, (*key, name)) for name, item in value.items()}
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: Tensor, key: tuple[Any, ...]) -> Tensor:
        tensor = tensor.detach()
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            # A tensor subclass, such as the state of an 8-bit optimizer.
            return tensor.to("cpu", copy=True)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)


def _root_cause(error: BaseException) -> BaseException:
    """The error of the first failing rank, without torch's wrapper."""
    if isinstance(error, CheckpointException):
        for failure in error.failures.values():
            return failure[0]
    return error


def _explain(error: BaseException, root: Location) -> str:
    cause = _root_cause(error)
    if isinstance(cause, StorageError):
        return str(cause)
    free_note = ""
    if isinstance(root, Path):
        try:
            with disk_errors("writing a checkpoint", root):
                if isinstance(cause, OSError):
                    raise cause
        except StorageError as explained:
            return str(explained)
        except OSError:
            pass
        # torch's writer reports a full disk as a RuntimeError of its stream, too.
        free_note = f" ({free_bytes(root) / 2**20:,.1f} MiB free)"
    return (
        f"A checkpoint could not be written below {root}: {type(cause).__name__}: {cause}{free_note}. "
        "Earlier checkpoints are intact. "
        "Free some space, or check that the store answers, then run the same command again: it resumes from the newest one."
    )
