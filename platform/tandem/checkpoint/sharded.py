"""Saves and loads training state with torch.distributed.checkpoint: each rank its shards, all of them in one folder.

Only what is trained is saved: a LoRA run's checkpoint holds its adapters, not the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.checkpoint.stateful import Stateful

from tandem.checkpoint import folders
from tandem.checkpoint.folders import SavedState
from tandem.errors import CheckpointError, StorageError
from tandem.storage import disk_errors, free_bytes

_NOTHING: Mapping[str, Stateful] = {}


class Trained(Protocol):
    """A model that is trained, as one rank holds it."""

    def training_state(self, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
        """This rank's part of `model` and `optimizer`, by the plain model's names and shapes; loaded into in place."""
        ...

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
        """Go on from what was loaded into a `training_state`."""
        ...


def save(
    root: Path,
    model: Trained,
    optimizer: torch.optim.Optimizer,
    state: SavedState,
    *,
    keep: int,
    extra: Mapping[str, Stateful] = _NOTHING,
) -> Path:
    """Write a checkpoint below `root` and return its folder. Every rank calls it, at the same step.

    `extra`: what else has a state, by name, such as an average of the weights.
    A full disk raises StorageError on every rank; checkpoints that were whole stay so.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    problem: str | None = None
    if rank == 0:
        try:
            folders.prepare(root, state.step)
        except (StorageError, OSError) as error:
            problem = str(error)
    _agree(problem)
    staging = folders.staging_folder(root, state.step)
    problem = None
    try:
        save_state(_content(model, optimizer) | dict(extra), checkpoint_id=staging, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError, RuntimeError) as error:
        problem = _explain(error, root)
    _agree(problem)
    if rank == 0:
        try:
            folders.publish(root, state, keep)
        except (StorageError, OSError) as error:
            problem = str(error)
    _agree(problem)
    return folders.step_folder(root, state.step)


def load(
    checkpoint: Path, model: Trained, optimizer: torch.optim.Optimizer, *, extra: Mapping[str, Stateful] = _NOTHING
) -> SavedState:
    """Put a checkpoint into `model`, `optimizer` and `extra`, however they are sharded now. Every rank calls it.

    Raises CheckpointError if it is damaged or of another model.
    """
    state = folders.read_state(checkpoint)
    content = _content(model, optimizer) | dict(extra)
    if (dist.get_rank() if dist.is_initialized() else 0) >= state.world:
        del content["random"]  # a rank that was not there has no random state to go on with
    try:
        load_state(content, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
        model.set_training_state(content, optimizer)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint} cannot be loaded: {_root_cause(error)}. "
            "Remove it; the run then goes on from the one before, or from the start."
        ) from error
    for random in content.get("random", {}).values():
        torch.set_rng_state(random)
    return state


def _content(model: Trained, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    random = {f"cpu-{dist.get_rank() if dist.is_initialized() else 0}": torch.get_rng_state()}
    return {**model.training_state(optimizer), "random": random}


def _agree(problem: str | None) -> None:
    """Raise StorageError on every rank if any has a problem, so that none waits for one that is gone."""
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise StorageError(found)


def _root_cause(error: BaseException) -> BaseException:
    """What the first failing rank met, out of torch's wrapping."""
    if isinstance(error, CheckpointException):
        for wrapped in error.failures.values():
            return wrapped[0]
    return error


def _explain(error: BaseException, root: Path) -> str:
    cause = _root_cause(error)
    try:
        with disk_errors("writing a checkpoint", root):
            if isinstance(cause, OSError):
                raise cause
    except StorageError as known:
        return str(known)
    except OSError:
        pass
    # torch's writer tells of a full disk as a RuntimeError of its stream, too.
    return (
        f"A checkpoint could not be written below {root}: {cause} ({free_bytes(root) / 2**20:,.1f} MiB free). Checkpoints "
        "written before are whole. Free some space, then run the same command again: it goes on from the newest one."
    )
