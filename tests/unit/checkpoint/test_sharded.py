"""Saved states are restored, also those saved in the background; damaged ones are reported and skipped."""

from __future__ import annotations

import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.checkpoint import files, folders
from tandem.checkpoint.chunks import ChunkedTensor
from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints
from tandem.errors import CheckpointError, StorageError
from tandem.storage import Location, file_system, join

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Weights:
    """A model of one matrix."""

    def __init__(self, value: float, *, name: str = "w", width: int = 4) -> None:
        self.name, self.w = name, torch.full((3, width), value)

    def training_state(self, optimizer: Any) -> dict[str, dict[str, Any]]:
        return {
            "model": {self.name: ChunkedTensor.of(self.w)},
            "optimizer": {f"{self.name}.step": ChunkedTensor.of(torch.zeros(()))},
        }

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Any) -> None:
        assert content["model"].keys() == {self.name}


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A new place for checkpoints."""
    return tmp_path / "checkpoints" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/checkpoints"


@pytest.fixture(params=[True, False], ids=["background", "at once"])
def checkpoints(request: pytest.FixtureRequest, root: Location) -> Checkpoints:
    return Checkpoints(root, keep=2, asynchronous=request.param)


def state(step: int) -> SavedState:
    return SavedState(step=step, tokens=step, loss=None, world=1)


def save(checkpoints: Checkpoints, step: int) -> None:
    """Weights that are as large as the step."""
    checkpoints.save(Weights(float(step)), None, state(step))  # type: ignore[arg-type]
    checkpoints.wait()


def loaded(checkpoints: Checkpoints) -> tuple[int | None, float, list[str]]:
    """The step that a run goes on from, its weights, and what was said."""
    weights = Weights(-1.0)
    found, said = checkpoints.load(weights, None)  # type: ignore[arg-type]
    assert len(weights.w.unique()) == 1
    return found and found.step, float(weights.w[0, 0]), said


def test_a_saved_state_is_restored(checkpoints: Checkpoints):
    assert loaded(checkpoints) == (None, -1.0, [])
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert loaded(checkpoints) == (3, 3.0, [])
    assert [folders.step_of(found) for found in folders.list_complete(checkpoints.root)] == [2, 3]
    assert folders.find_damage(folders.latest(checkpoints.root)) == []


def test_training_continues_during_a_save_and_does_not_change_it(root: Location, monkeypatch: pytest.MonkeyPatch):
    free, told = threading.Event(), []
    open_staging = folders.open_staging
    monkeypatch.setattr(folders, "open_staging", lambda *of: (free.wait(30), open_staging(*of))[1])
    checkpoints, weights = Checkpoints(root, keep=2), Weights(1.0)
    checkpoints.save(weights, None, state(1), on_commit=told.append)  # type: ignore[arg-type]
    weights.w.fill_(7.0)
    assert folders.latest(root) is None and not told
    free.set()
    # The next save waits for the one before; its copy must not reach that one either.
    checkpoints.save(weights, None, state(2), on_commit=told.append)  # type: ignore[arg-type]
    assert told[0] == folders.step_folder(root, 1)
    checkpoints.wait()
    assert told[1:] == [folders.step_folder(root, 2)]
    assert loaded(checkpoints) == (2, 7.0, [])
    folders.quarantine(folders.latest(root))
    assert loaded(checkpoints) == (1, 1.0, [])


def test_on_commit_is_called_before_wait_returns(checkpoints: Checkpoints):
    told: list[Location] = []

    def tell(checkpoint: Location) -> None:
        time.sleep(0.2)
        assert folders.list_complete(checkpoints.root) == [checkpoint]
        told.append(checkpoint)

    checkpoints.save(Weights(1.0), None, state(1), on_commit=tell)  # type: ignore[arg-type]
    checkpoints.wait()
    assert told == [folders.step_folder(checkpoints.root, 1)]


def flip(path: str, store: Any) -> None:
    held = bytearray(store.cat_file(path))
    held[len(held) // 2] ^= 1
    store.pipe_file(path, bytes(held))


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json"])
@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip, "has other bytes than were written"),
        (lambda path, store: store.pipe_file(path, store.cat_file(path)[:-1]), "bytes of"),
        (lambda path, store: store.rm_file(path), "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_loaded(
    checkpoints: Checkpoints, name: str, harm, said: str
):
    for step in (1, 2):
        save(checkpoints, step)
    newest = folders.latest(checkpoints.root)
    harm(str(join(newest, name)), file_system(checkpoints.root))
    step, value, notices = loaded(checkpoints)
    assert (step, value) == (1, 1.0)
    (notice,) = notices
    assert str(newest) in notice and f"{name} " in notice and said in notice and "resumes from step 1" in notice
    # It is told once, and does not take the place of a good one.
    assert loaded(checkpoints) == (1, 1.0, [])
    save(checkpoints, 3)
    assert [folders.step_of(found) for found in folders.list_complete(checkpoints.root)] == [1, 3]


def test_a_missing_manifest_is_reported_and_the_previous_checkpoint_loaded(checkpoints: Checkpoints):
    for step in (1, 2):
        save(checkpoints, step)
    file_system(checkpoints.root).rm_file(str(join(folders.latest(checkpoints.root), "manifest.json")))
    step, _, (notice,) = loaded(checkpoints)
    assert step == 1 and "step-00000002 has no manifest.json" in notice


def test_if_all_checkpoints_are_damaged_the_run_starts_over_with_a_message(checkpoints: Checkpoints):
    save(checkpoints, 1)
    file_system(checkpoints.root).rm_file(str(join(folders.latest(checkpoints.root), "__0_0.distcp")))
    step, value, (notice,) = loaded(checkpoints)
    assert (step, value) == (None, -1.0) and "resumes from the start: there is none before" in notice


def test_an_error_in_the_background_is_raised_by_the_next_save_and_older_checkpoints_stay(
    root: Location, monkeypatch: pytest.MonkeyPatch
):
    checkpoints, told = Checkpoints(root, keep=2), []
    save(checkpoints, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.CheckpointWriter, "write_data", refuse)
    checkpoints.save(Weights(2.0), None, state(2), on_commit=told.append)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="disk is full" if isinstance(root, Path) else "could not be written below"):
        checkpoints.save(Weights(3.0), None, state(3))  # type: ignore[arg-type]
    assert not told and loaded(checkpoints)[:2] == (1, 1.0)


def test_an_unreachable_store_is_reported_and_quarantines_nothing(root: Location, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(root, keep=2)
    for step in (1, 2):
        save(checkpoints, step)
    store = type(file_system(root))
    opened = store.open

    def gone(self: Any, path: str, *of: Any, **options: Any) -> Any:
        if "step-00000002/__0_0" in str(path):
            raise OSError("Input/output error")
        return opened(self, path, *of, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "open", gone)
        if isinstance(root, Path):
            # What a disk cannot read it does not have.
            step, _, (notice,) = loaded(checkpoints)
            assert step == 1 and "__0_0.distcp cannot be read (Input/output error)" in notice
            return
        with pytest.raises(StorageError, match=r"cannot be read: OSError: Input/output error\. They are as they were"):
            loaded(checkpoints)
    assert loaded(checkpoints) == (2, 2.0, [])


def test_a_failed_removal_does_not_end_a_run(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        raise ValueError("an error of the store's own")

    monkeypatch.setattr(folders, "prune", refuse)
    for step in (1, 2, 3):
        save(checkpoints, step)
    assert loaded(checkpoints) == (3, 3.0, [])


def test_a_checkpoint_of_another_model_is_refused(checkpoints: Checkpoints):
    save(checkpoints, 1)
    for other in (Weights(0.0, name="v"), Weights(0.0, width=5)):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            checkpoints.load(other, None)  # type: ignore[arg-type]
    assert loaded(checkpoints) == (1, 1.0, [])
