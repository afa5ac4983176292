"""Content storage: one object for each file or part, below a folder or a URI that fsspec knows.

Contents are written beside their final place, with mode 0600, and published by one rename; an object store publishes an object
when its writer closes it. So a reader sees a whole content or none. All calls block: they belong in threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Self

from tandem.errors import FileError, StorageError
from tandem.private import make_private_folder
from tandem.storage import Location, base_name, disk_errors, file_system, free_bytes, join, located, store_errors

READ_BYTES = 2**20
"""Bytes of one read of a content."""
REMOTE_BLOCK_BYTES = 8 * 2**20
"""Bytes that a writer to an object store collects before it sends them; stores take parts of 5 MiB or more."""
STAGING, CONTENTS = "staging", "contents"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredContent:
    """A published content."""

    location: str
    size_bytes: int
    sha256: str
    md5: str


class ContentStore:
    """The contents below one location. Folders are made at the first write."""

    def __init__(self, location: Location) -> None:
        """`location`: of this store alone; a subfolder for each database, since contents without a record are removed."""
        self.location = located(location)

    @classmethod
    def open(cls, identity: str, location: str | None) -> Self:
        """The store of the registry with an identity, below `gateway.files.location`; None: below TANDEM_HOME."""
        from tandem.settings import settings  # not for the child process that checks a content

        return cls(join(located(location or settings().root / "files"), identity[:12]))

    def writer(self, name: str, expected_bytes: int = 0) -> ContentWriter:
        """A writer of the content `name`; StorageError if `expected_bytes` do not fit on the disk."""
        folder = join(self.location, CONTENTS, name[-2:])
        if not isinstance(folder, Path):
            return RemoteWriter(str(join(folder, name)))
        staging = join(self.location, STAGING)
        assert isinstance(staging, Path)
        if (free := free_bytes(staging)) < expected_bytes:
            raise StorageError(
                f"The file has {expected_bytes:,} bytes and the disk of {self.location} has {free:,} free. Tell the operator, or "
                "delete files."
            )
        return LocalWriter(staging / f"{name}.{uuid.uuid4().hex[:8]}", folder / name)

    def stale(self, age_s: float) -> Iterator[tuple[str, bool]]:
        """Locations of contents whose last byte was written `age_s` ago or earlier, and whether each is published."""
        last_written_before = time.time() - age_s
        if isinstance(self.location, Path):
            for folder, published in ((STAGING, False), (CONTENTS, True)):
                for path in (self.location / folder).rglob("*"):
                    with contextlib.suppress(FileNotFoundError):  # another gateway removed it
                        if path.is_file() and path.stat().st_mtime < last_written_before:
                            yield str(path), published
            return
        with store_errors(self.location, "read"):
            files = file_system(self.location)
            scheme = str(self.location).partition("://")[0]
            for path, info in files.find(str(self.location), detail=True).items():
                if (written_at := _written_at(info)) is not None and written_at < last_written_before:
                    yield f"{scheme}://{str(path).lstrip('/')}", True


class ContentWriter:
    """Writes one content: `write` any number of times, then `publish`, or `discard`, which leaves nothing behind."""

    def __init__(self, location: str, file: IO[bytes]) -> None:
        self.size_bytes = 0
        self._location = location
        self._file = file
        self._sha256, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def write(self, chunk: bytes) -> None:
        """Append bytes; StorageError if the disk is full or the store refuses."""
        with self._errors():
            self._file.write(chunk)
        self._sha256.update(chunk)
        self._md5.update(chunk)
        self.size_bytes += len(chunk)

    def publish(self) -> StoredContent:
        """Make the content readable at its location."""
        with self._errors():
            self._publish()
        return StoredContent(
            location=self._location,
            size_bytes=self.size_bytes,
            sha256=self._sha256.hexdigest(),
            md5=self._md5.hexdigest(),
        )

    def discard(self) -> None:
        """Remove what was written and not published; afterwards nothing happens."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def _publish(self) -> None:
        raise NotImplementedError

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError


class LocalWriter(ContentWriter):
    """A content in a folder."""

    def __init__(self, staging: Path, target: Path) -> None:
        self._staging, self._target = staging, target
        with disk_errors("storing an uploaded file", staging):
            make_private_folder(staging.parent)
            file = open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)  # noqa: SIM115
        super().__init__(str(target), file)

    def discard(self) -> None:
        """Remove the staging file."""
        self._file.close()
        self._staging.unlink(missing_ok=True)

    def _publish(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        make_private_folder(self._target.parent)
        self._staging.rename(self._target)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return disk_errors("storing an uploaded file", self._staging)


class RemoteWriter(ContentWriter):
    """An object in a store: it is there once its writer is closed."""

    def __init__(self, uri: str) -> None:
        self._uri, self._published = uri, False
        with store_errors(uri, "written"):
            self._files = file_system(uri)
            file = self._files.open(uri, "wb", block_size=REMOTE_BLOCK_BYTES)
        super().__init__(uri, file)

    def discard(self) -> None:
        """Abort the object's transfer."""
        if self._published:
            return
        self._published = True
        # What cannot be aborted, the store's own rule for incomplete transfers removes.
        for step in (self._abort, self._remove):
            with contextlib.suppress(Exception):
                step()

    def _publish(self) -> None:
        self._file.close()
        self._published = True

    def _abort(self) -> None:
        if hasattr(self._file, "discard"):
            self._file.discard()
            # Else the file would be written when it is collected.
            self._file.closed = True  # type: ignore[misc]
        else:
            self._file.close()

    def _remove(self) -> None:
        if self._files.exists(self._uri):
            self._files.rm_file(self._uri)

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return store_errors(self._uri, "written")


def open_content(location: str) -> IO[bytes]:
    """The content at a location, open for reading; FileError if it is gone."""
    place = located(location)
    try:
        if isinstance(place, Path):
            return place.open("rb", buffering=0)
        with store_errors(place, "read"):
            return _opened(place)
    except FileNotFoundError:
        raise FileError(
            f"The content of {base_name(location)} is gone: it was deleted, or its disk was changed."
        ) from None


def read_chunks(location: str) -> Iterator[bytes]:
    """The content at a location, in pieces of at most `READ_BYTES`."""
    with open_content(location) as file:
        while chunk := file.read(READ_BYTES):
            yield chunk


def join_contents(locations: Iterable[str], writer: ContentWriter) -> StoredContent:
    """Publish the contents at some locations, one after the other, as one."""
    for location in locations:
        for chunk in read_chunks(location):
            writer.write(chunk)
    return writer.publish()


def remove_content(location: str) -> None:
    """Remove the content at a location; nothing happens if there is none."""
    place = located(location)
    if isinstance(place, Path):
        with disk_errors("removing a file", place):
            place.unlink(missing_ok=True)
        return
    with store_errors(place, "written"), contextlib.suppress(FileNotFoundError):
        file_system(place).rm_file(str(place))


def _opened(uri: str) -> IO[bytes]:
    files = file_system(uri)
    if not files.exists(uri):
        raise FileError(f"The content of {base_name(uri)} is gone: it was deleted from its store.")
    opened: IO[bytes] = files.open(uri, "rb", block_size=REMOTE_BLOCK_BYTES)
    return opened


def _written_at(info: dict[str, Any]) -> float | None:
    """Seconds since 1970 at which a store's object was written; None where the store does not tell."""
    for key in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(key)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime):
            return value.timestamp()
    return None
