"""Content storage: published whole or not at all, in a folder and in an object store; the janitor leaves what has a record."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from tandem.db.schema import FileRow
from tandem.errors import FileError, StorageError
from tandem.files.content import ContentStore, join_contents, open_content, read_chunks, remove_content
from tandem.files.janitor import Janitor
from tandem.files.records import NewFile, Purpose
from tandem.files.uploads import UploadStore
from tandem.registry import Registry

DAYS_AGO = time.time() - 10 * 86_400


@pytest.fixture(params=["folder", "memory", "s3"])
def contents(request: pytest.FixtureRequest, tmp_path: Path) -> ContentStore:
    """An empty store: in a folder, in fsspec's memory, on a real S3 server."""
    if request.param == "folder":
        return ContentStore(tmp_path / "files")
    if request.param == "memory":
        return ContentStore(f"memory://{tmp_path.name}")
    request.getfixturevalue("s3")
    import s3fs

    s3fs.S3FileSystem().mkdirs(bucket := tmp_path.name.replace("_", "-").lower())
    return ContentStore(f"s3://{bucket}/files")


def everything(contents: ContentStore) -> list[str]:
    return sorted(location for location, _ in contents.stale(-10))


def test_a_content_is_read_as_it_was_written(contents: ContentStore) -> None:
    data = os.urandom(9_000_000)
    with contents.writer("file-ab") as writer:
        for start in range(0, len(data), 1_000_000):
            writer.write(data[start : start + 1_000_000])
        stored = writer.publish()
    assert (stored.size_bytes, stored.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert b"".join(read_chunks(stored.location)) == data
    assert everything(contents) == [stored.location]
    with contents.writer("file-cd") as writer:
        joined = join_contents([stored.location, stored.location], writer)
    assert b"".join(read_chunks(joined.location)) == data * 2
    for _ in range(2):
        remove_content(stored.location)
    with pytest.raises(FileError, match="is gone"):
        open_content(stored.location)
    assert everything(contents) == [joined.location]


def test_a_content_that_is_not_published_leaves_nothing_behind(contents: ContentStore) -> None:
    with pytest.raises(RuntimeError), contents.writer("file-ab") as writer:
        writer.write(b"x" * 20_000_000)
        raise RuntimeError
    assert everything(contents) == []
    location = str(contents.location)
    if location.startswith("s3://"):
        import s3fs

        transfers = s3fs.S3FileSystem().call_s3("list_multipart_uploads", Bucket=location.split("/")[2])
        assert not transfers.get("Uploads"), (
            "an object store keeps, and charges for, parts of a transfer that nobody aborts"
        )


def test_a_file_larger_than_the_disk_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="free"):
        ContentStore(tmp_path).writer("file-ab", expected_bytes=2**60)


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    writer = ContentStore(tmp_path).writer("file-ab")
    os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
    with pytest.raises(StorageError, match="The disk is full"):
        writer.write(b"x")
    writer.discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_janitor_removes_what_has_no_record_and_nothing_else(tmp_path: Path) -> None:
    contents = ContentStore(tmp_path / "files")
    with Registry(f"sqlite:///{tmp_path}/tandem.db") as registry:
        store = UploadStore.at(registry.address)
        locations = {}
        for name in ("recorded", "deleted", "unrecorded", "young"):
            with contents.writer(f"file-{name}") as writer:
                writer.write(b"x")
                stored = writer.publish()
            locations[name] = stored.location
            if name in ("recorded", "deleted"):
                file = NewFile(
                    id=f"file-{name}", tenant="lab", key_id="", purpose=Purpose.USER_DATA, filename="a",
                    size_bytes=1, sha256=stored.sha256, location=stored.location,
                )  # fmt: skip
                store.add(file, quota_bytes=10)
        broken, going_on = contents.writer("file-broken"), contents.writer("file-going-on")
        store.delete("file-deleted", "lab")
        old = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
        for path in old:
            if "young" not in path.name and "going-on" not in path.name:
                os.utime(path, (DAYS_AGO, DAYS_AGO))
        janitor = Janitor(store, contents)
        janitor.remove_ended()
        janitor.remove_unrecorded()
        left = {path.name.partition(".")[0] for path in (tmp_path / "files").rglob("*") if path.is_file()}
        assert left == {"file-recorded", "file-young", "file-going-on"}
        broken.discard()
        going_on.discard()
        with store._adding() as session:
            session.execute(update(FileRow).values(deleted_at=datetime.now(UTC) - timedelta(days=40), location=None))
        store.forget_deleted()
        assert store.page("lab", limit=10) == []
        assert stat.S_IMODE((tmp_path / "files" / "contents").stat().st_mode) == 0o700
