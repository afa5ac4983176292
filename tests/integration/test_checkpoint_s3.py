"""Checkpoints in an object store: a real S3 server (moto) through s3fs."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_world import load_parity
from resume_worlds import check, run_worlds

from tandem.checkpoint import folders
from tandem.checkpoint.chunks import ChunkedTensor
from tandem.checkpoint.folders import SavedState
from tandem.checkpoint.sharded import Checkpoints
from tandem.errors import StorageError
from tandem.storage import check_writable, file_system

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    """The URI of a bucket of this module's own."""
    file_system("s3://checkpoints").mkdir("checkpoints")
    return "s3://checkpoints"


@pytest.fixture
def root(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}/run"


class Weights:
    """A model of a few megabytes: more than one part of an upload."""

    def __init__(self, value: float) -> None:
        self.w = torch.full((3000, 1000), value)

    def training_state(self, optimizer: Any) -> dict[str, dict[str, Any]]:
        return {"model": {"w": ChunkedTensor.of(self.w)}, "optimizer": {}}

    def set_training_state(self, content: dict[str, dict[str, Any]], optimizer: Any) -> None:
        pass


def save(checkpoints: Checkpoints, step: int) -> None:
    kept = SavedState(step=step, tokens=step, loss=None, world=1)
    checkpoints.save(Weights(float(step)), None, kept)  # type: ignore[arg-type]


def loaded(root: str) -> tuple[int | None, float, list[str]]:
    weights = Weights(-1.0)
    found, said = Checkpoints(root, keep=2).load(weights, None)  # type: ignore[arg-type]
    assert len(weights.w.unique()) == 1
    return found and found.step, float(weights.w[0, 0]), said


def test_checkpoints_are_restored_and_old_ones_removed(root: str):
    checkpoints = Checkpoints(root, keep=2)
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.wait()
    assert loaded(root) == (3, 3.0, [])
    assert folders.list_complete(root) == [f"{root}/step-0000000{step}" for step in (2, 3)]
    assert not file_system(root).exists(f"{root}/step-00000001")


def test_a_checkpoint_without_a_manifest_is_ignored(root: str, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(root, keep=2, asynchronous=False)
    save(checkpoints, 1)

    def fail(records: Any) -> bytes:
        raise OSError("the connection was closed")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "_manifest", fail)
        with pytest.raises(StorageError, match="the connection was closed"):
            save(checkpoints, 2)
    # All of its data is there.
    assert file_system(root).exists(f"{root}/step-00000002/state.json")
    step, value, (notice,) = loaded(root)
    assert (step, value) == (1, 1.0) and "step-00000002 has no manifest.json" in notice
    # The same step is then written anew.
    save(checkpoints, 2)
    assert loaded(root) == (2, 2.0, [])


@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_object_is_reported_and_the_previous_checkpoint_loaded(root: str, harm: str):
    checkpoints = Checkpoints(root, keep=2, asynchronous=False)
    for step in (1, 2):
        save(checkpoints, step)
    store, path = file_system(root), f"{root}/step-00000002/__0_0.distcp"
    held = store.cat_file(path)
    if harm == "missing":
        store.rm_file(path)
    else:
        store.pipe_file(path, held[:-100] if harm == "truncated" else held[:5000] + b"\x01" + held[5001:])
    step, value, (notice,) = loaded(root)
    assert (step, value) == (1, 1.0) and f"{root}/step-00000002 is damaged: __0_0.distcp " in notice


def test_an_unwritable_bucket_is_refused_before_work_starts(root: str):
    check_writable(root)
    with pytest.raises(StorageError, match="Check that the bucket exists"):
        check_writable("s3://no-such-bucket/run")


def test_ranks_write_shards_to_a_store_and_another_layout_resumes(root: str, tmp_path: Path):
    way = ("llama", "fsdp2", 2, "tp2", 2)
    check(load_parity(), run_worlds(tmp_path, (way,), place=root), way)
    assert len(folders.list_complete(f"{root}/llama fsdp2 2")) == 1
