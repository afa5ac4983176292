"""Checkpoints on disk: which are whole, which is newest, and publishing one. Imports no torch.

checkpoints/step-00000100/          whole, since the name appears by one rename when every rank has written
    .metadata, __0_0.distcp, ...    torch.distributed.checkpoint
    state.json                      step, data cursor, and what else is plain
checkpoints/.step-00000200.tmp/     being written, or left by a run that died
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tandem.errors import CheckpointError
from tandem.storage import disk_errors

STATE_NAME = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    """The plain part of a checkpoint."""

    step: int
    tokens: int
    """Tokens trained on so far."""
    loss: float | None
    """Last reported."""
    world: int
    """Ranks that wrote it."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """Where the data goes on."""


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return root / f"step-{step:08d}"


def staging_folder(root: Path, step: int) -> Path:
    """Where it is written until all of it is there."""
    return root / f".step-{step:08d}.tmp"


def saved(root: Path) -> list[Path]:
    """The whole checkpoints below `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_NAME).exists())


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(saved(root)), None)


def prepare(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of `step` into; what dead runs left half-written goes away."""
    with disk_errors("writing a checkpoint", root):
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".step-*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        staging = staging_folder(root, step)
        staging.mkdir()
    return staging


def publish(root: Path, state: SavedState, keep: int) -> Path:
    """Give the written folder of `state.step` its name, then remove all but the newest `keep`."""
    staging, final = staging_folder(root, state.step), step_folder(root, state.step)
    with disk_errors("writing a checkpoint", root):
        (staging / STATE_NAME).write_text(json.dumps(asdict(state)))
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
    for old in saved(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def read_state(checkpoint: Path) -> SavedState:
    """The plain part of a checkpoint; CheckpointError if it cannot be read."""
    path = checkpoint / STATE_NAME
    try:
        return SavedState(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Remove {checkpoint}; the run then goes on from the one before."
        ) from error
