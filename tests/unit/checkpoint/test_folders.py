"""Only complete checkpoints are listed, the newest and the best are kept, and any changed byte is found."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from tandem.checkpoint import folders
from tandem.checkpoint.folders import FileRecord, SavedState
from tandem.errors import CheckpointError, StorageError
from tandem.storage import Location, base_name, file_system, join


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A new place for checkpoints."""
    return tmp_path / "checkpoints" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/checkpoints"


def state(step: int, **metrics: float) -> SavedState:
    return SavedState(step=step, tokens=step * 10, loss=1.5, world=2, cursor={"rows": step * 4}, metrics=metrics)


def save(root: Location, step: int, *, keep: int = 2, best: str | None = None, **metrics: float) -> Location:
    folder = folders.open_staging(root, step)
    content = b"weights of " + str(step).encode()
    file_system(root).pipe_file(str(join(folder, "part")), content)
    record = FileRecord(size=len(content), digest=folders.digest_of(content))
    made = folders.commit(root, state(step, **metrics), {"part": record})
    folders.prune(root, keep, best)
    return made


def steps(root: Location) -> list[int]:
    return [folders.step_of(found) for found in folders.list_complete(root)]


def test_the_newest_are_kept_and_found(root: Location):
    assert folders.latest(root) is None
    for step in (5, 10, 100):
        save(root, step)
    assert steps(root) == [10, 100]
    assert folders.read_state(folders.latest(root)) == state(100)


def test_an_incomplete_checkpoint_is_ignored_and_removed_by_the_next_save(root: Location):
    save(root, 5)
    folder = folders.open_staging(root, 10)
    file_system(root).pipe_file(str(join(folder, "part")), b"half")
    assert steps(root) == [5]
    save(root, 15)
    assert steps(root) == [5, 15]
    left = {base_name(path) for path in file_system(root).ls(str(root), detail=False)}
    assert left == {"step-00000005", "step-00000015"}


def test_a_step_saved_again_replaces_itself(root: Location):
    save(root, 5)
    assert base_name(save(root, 5)) == "step-00000005"
    assert steps(root) == [5] and not folders.find_damage(folders.latest(root))


@pytest.mark.parametrize(("metric", "kept"), [("evaluation_loss", 10), ("evaluation_reward_accuracy", 20)])
def test_the_best_is_kept_beside_the_newest(root: Location, metric: str, kept: int):
    # The best loss is the smallest, the best accuracy the largest; of the same value the newer one counts.
    for step, value in ((5, 0.5), (10, 0.1), (20, 0.9), (30, 0.5), (40, 0.5), (50, 0.5)):
        save(root, step, best=metric, **{metric: value})
    assert steps(root) == [kept, 40, 50]


def test_checkpoints_without_the_metric_are_never_the_best(root: Location):
    save(root, 5, best="evaluation_loss", keep=1)
    save(root, 10, best="evaluation_loss", keep=1, evaluation_loss=3.0)
    save(root, 15, best="evaluation_loss", keep=1, evaluation_loss=float("nan"))
    save(root, 20, best="evaluation_loss", keep=1)
    assert steps(root) == [10, 20]


def test_an_intact_checkpoint_has_no_damage(root: Location):
    assert folders.find_damage(save(root, 5)) == []


def test_a_flipped_byte_is_found_and_its_file_named(root: Location):
    checkpoint = save(root, 5)
    file_system(root).pipe_file(str(join(checkpoint, "part")), b"weightz of 5")
    assert folders.find_damage(checkpoint) == ["part has other bytes than were written"]


def test_a_truncated_file_is_found_with_its_sizes(root: Location):
    checkpoint = save(root, 5)
    file_system(root).pipe_file(str(join(checkpoint, "part")), b"weights")
    assert folders.find_damage(checkpoint) == ["part has 7 bytes of 12"]


@pytest.mark.parametrize("name", ["part", "state.json"])
def test_a_missing_file_is_found_and_named(root: Location, name: str):
    checkpoint = save(root, 5)
    file_system(root).rm_file(str(join(checkpoint, name)))
    assert folders.find_damage(checkpoint) == [f"{name} is missing"]


def test_a_changed_number_in_the_state_is_found(root: Location):
    checkpoint = save(root, 5)
    path = str(join(checkpoint, "state.json"))
    file_system(root).pipe_file(path, file_system(root).cat_file(path).replace(b'"step": 5', b'"step": 7'))
    assert folders.find_damage(checkpoint) == ["state.json has other bytes than were written"]


@pytest.mark.parametrize("change", [lambda held: held[:-20], lambda held: held.replace(b'"size": 12', b'"size": 13')])
def test_a_damaged_manifest_is_named(root: Location, change):
    checkpoint = save(root, 5)
    path = str(join(checkpoint, "manifest.json"))
    file_system(root).pipe_file(path, change(file_system(root).cat_file(path)))
    (found,) = folders.find_damage(checkpoint)
    assert "manifest.json is damaged" in found


def test_each_rank_verifies_a_part_of_the_files(root: Location):
    checkpoint = save(root, 5)
    for name in ("part", "state.json"):
        file_system(root).rm_file(str(join(checkpoint, name)))
    shares = [folders.find_damage(checkpoint, share, 3) for share in range(3)]
    assert sorted(found for share in shares for found in share) == ["part is missing", "state.json is missing"]
    assert max(map(len, shares)) == 1


def test_a_quarantined_checkpoint_is_not_used_and_is_pruned(root: Location):
    save(root, 5)
    folders.quarantine(save(root, 10))
    assert steps(root) == [5] and folders.list_incomplete(root) == []
    save(root, 15)
    # It does not count as one of the two that are kept.
    assert steps(root) == [5, 15]
    assert not file_system(root).exists(str(join(root, "step-00000010", "part")))


def test_a_folder_without_a_manifest_is_listed_as_incomplete(root: Location):
    checkpoint = save(root, 5)
    file_system(root).rm_file(str(join(checkpoint, "manifest.json")))
    assert [folders.step_of(found) for found in folders.list_incomplete(root)] == [5]
    assert steps(root) == []


def test_a_file_with_the_name_of_a_checkpoint_is_reported_and_kept(tmp_path: Path):
    save(tmp_path, 5)
    (tmp_path / "step-00000010").write_text("mine")
    with pytest.raises(StorageError, match=r"step-00000010 is a file.*Remove it"):
        save(tmp_path, 10)
    assert steps(tmp_path) == [5] and (tmp_path / "step-00000010").read_text() == "mine"


def test_a_damaged_state_is_refused_with_the_next_step(root: Location):
    folder = save(root, 5)
    file_system(root).pipe_file(str(join(folder, "state.json")), b"{}")
    with pytest.raises(CheckpointError, match="resumes from the previous one"):
        folders.read_state(folder)
