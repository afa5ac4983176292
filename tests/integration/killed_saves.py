"""Processes for test_killed_saves.py: each is killed by SIGKILL at a point of its second save.

python killed_saves.py FOLDER, which writes FOLDER/POINT/checkpoints for each point.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tandem.checkpoint import files, folders
from tandem.checkpoint.chunks import ChunkedTensor
from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints


class Weights:
    """Two matrices, of as many bytes as reach the disk before a file is closed."""

    def __init__(self, value: float) -> None:
        self.held = {name: torch.full((500, 1000), value) for name in ("a", "b")}

    def training_state(self, optimizer: Any) -> dict[str, dict[str, Any]]:
        return {"model": {name: ChunkedTensor.of(held) for name, held in self.held.items()}, "optimizer": {}}

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Any) -> None:
        pass


def die(*_: Any, **__: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def after(function: Callable[..., Any], calls: int = 1) -> Callable[..., Any]:
    """The function, after some calls of which the process dies."""
    left = [calls]

    def called(*of: Any, **options: Any) -> Any:
        result = function(*of, **options)
        left[0] -= 1
        return result if left[0] else die()

    return called


POINTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "the folder is empty": (folders, "open_staging", after(folders.open_staging)),
    "a part is written": (files._DigestingStream, "write", after(files._DigestingStream.write, 20)),
    "all parts are written": (folders, "commit", die),
    "the state is written": (folders, "_manifest", die),
    "all is written": (Path, "rename", die),
    "it has its name": (Path, "rename", after(Path.rename)),
}
"""What is there when the process dies, and how that is brought about."""


def run(root: Path, asynchronous: bool, point: str) -> None:
    checkpoints = Checkpoints(root, keep=2, asynchronous=asynchronous)
    for step in (1, 2):
        if step == 2:
            thing, name, instead = POINTS[point]
            setattr(thing, name, instead)
        kept = SavedState(step=step, tokens=step, loss=None, world=1)
        checkpoints.save(Weights(float(step)), None, kept)  # type: ignore[arg-type]
        checkpoints.wait()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for point in POINTS:
        for asynchronous in (False, True):
            # A copy of this process, which has no threads yet.
            child = os.fork()
            if not child:
                run(folder / f"{point} {asynchronous}", asynchronous, point)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, point


if __name__ == "__main__":
    main(Path(sys.argv[1]))
