"""Publishing whole or not at all, and disks that refuse."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from tandem import storage
from tandem.errors import StorageError


def names(folder: Path) -> list[str]:
    """What a folder holds, hidden files too."""
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_whole_when_it_is_done(tmp_path):
    target = tmp_path / "deep" / "target"
    with storage.publish_folder(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
        assert staging.parent == target.parent
    assert (target / "a").read_text() == "1"
    assert names(target.parent) == ["target"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), storage.publish_folder(tmp_path / "target") as staging:
        (staging / "a").write_text("1")
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_an_existing_folder_is_refused_or_replaced_on_demand(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(StorageError, match="exists already"), storage.publish_folder(target):
        pytest.fail("must not get here")
    with storage.publish_folder(target, replace=True) as staging:
        (staging / "new").touch()
        assert names(target) == ["old"]
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ZeroDivisionError), storage.publish_folder(target, replace=True):
        raise ZeroDivisionError
    assert names(target) == ["old"]
    assert names(tmp_path) == ["target"]


def test_of_two_that_publish_the_same_folder_the_first_wins_and_the_second_is_told(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(StorageError, match="appeared while"), storage.publish_folder(target) as late:
        (late / "late").touch()
        with storage.publish_folder(target) as early:
            (early / "early").touch()
    assert names(target) == ["early"]
    assert names(tmp_path) == ["target"]


def test_a_reader_of_an_atomic_write_never_sees_a_part(tmp_path):
    path = tmp_path / "file"
    contents = {"a" * 100_000, "b" * 50_000}
    storage.write_atomic(path, "a" * 100_000)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        storage.write_atomic(path, sorted(contents)[i % 2])
    done.set()
    reader.join()
    assert seen <= contents
    assert names(tmp_path) == ["file"]


def test_an_atomic_write_takes_bytes_and_makes_its_folder(tmp_path):
    storage.write_atomic(tmp_path / "a" / "b", b"\x00\xff")
    assert (tmp_path / "a" / "b").read_bytes() == b"\x00\xff"


def test_a_full_disk_says_how_much_is_free_and_what_to_do(tmp_path):
    # /dev/full is a real device on which each write finds no space.
    with (
        pytest.raises(StorageError, match=r"disk is full while saving .* MiB free.*TANDEM_HOME"),
        storage.disk_errors("saving", tmp_path / "x"),
    ):
        with open("/dev/full", "wb") as file:
            file.write(b"x")


def test_a_full_disk_while_publishing_leaves_nothing_behind(tmp_path):
    with pytest.raises(StorageError, match="disk is full"), storage.publish_folder(tmp_path / "target") as staging:
        (staging / "a").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_a_forbidden_write_is_a_storage_error_and_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(StorageError, match="Not allowed to write"), storage.disk_errors("saving", tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(FileNotFoundError), storage.disk_errors("saving", tmp_path):
        (tmp_path / "missing").read_text()


def test_too_little_space_is_refused_before_work_starts(tmp_path):
    storage.require_space(tmp_path / "not" / "yet", 1, "A note")
    with pytest.raises(StorageError, match=r"A film needs about .* MiB at .* are free"):
        storage.require_space(tmp_path, 2**62, "A film")


def test_local_paths_are_local_and_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.local_path("x/y") == tmp_path / "x" / "y"
    assert storage.local_path(f"file://{tmp_path}/z") == tmp_path / "z"
    assert storage.local_path(tmp_path) == tmp_path
    assert storage.local_path("~") == Path.home()
    for uri in ("s3://bucket/x", "http://host/x", "hf:model"):
        with pytest.raises(StorageError, match="is not a local path"):
            storage.local_path(uri)
