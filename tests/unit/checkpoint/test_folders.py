"""Only whole checkpoints count, and the newest ones stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.checkpoint import folders
from tandem.checkpoint.folders import SavedState
from tandem.errors import CheckpointError


def state(step: int) -> SavedState:
    return SavedState(step=step, tokens=step * 10, loss=1.5, world=2, cursor={"rows": step * 4})


def save(root: Path, step: int, keep: int = 2) -> Path:
    (folders.prepare(root, step) / "part").write_text("weights")
    return folders.publish(root, state(step), keep)


def test_the_newest_are_kept_and_found(tmp_path: Path):
    assert folders.latest(tmp_path / "none") is None
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert [p.name for p in folders.saved(tmp_path)] == ["step-00000010", "step-00000100"]
    newest = folders.latest(tmp_path)
    assert newest is not None and folders.read_state(newest) == state(100)


def test_what_is_half_written_is_not_seen_and_goes_with_the_next_save(tmp_path: Path):
    save(tmp_path, 5)
    folders.prepare(tmp_path, 10)
    newest = folders.latest(tmp_path)
    assert newest is not None and newest.name == "step-00000005"
    save(tmp_path, 15)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000015"]


def test_a_step_saved_again_replaces_itself(tmp_path: Path):
    save(tmp_path, 5)
    assert save(tmp_path, 5).name == "step-00000005"
    assert len(folders.saved(tmp_path)) == 1


def test_a_damaged_state_is_refused_with_what_to_do(tmp_path: Path):
    folder = save(tmp_path, 5)
    (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="goes on from the one before"):
        folders.read_state(folder)
