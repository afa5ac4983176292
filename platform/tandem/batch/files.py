"""Files of a batch run on a disk or in an object store: streamed reads, atomic writes."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tandem.storage import Location, disk_errors, file_system, store_errors, write_atomic

BLOCK_BYTES = 1 << 20
"""What is asked of an object store at a time."""


@contextlib.contextmanager
def reading(place: Location) -> Iterator[IO[bytes]]:
    """A file, open for the length of the block."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            yield file
        return
    # What fsspec opens asks for a whole block, of 50 MB in S3, to find the end of each line.
    raw = file_system(place).open(place, "rb", block_size=BLOCK_BYTES)
    with io.BufferedReader(raw, BLOCK_BYTES) as file:
        yield file


def write(place: Location, data: bytes) -> None:
    """A file that a reader sees whole or not at all; an object store publishes an object in one step by itself."""
    if isinstance(place, Path):
        write_atomic(place, data)
    else:
        with store_errors(place, "written"):
            file_system(place).pipe_file(place, data)


@contextlib.contextmanager
def writing(place: Location) -> Iterator[IO[bytes]]:
    """The same for a file that is too large to hold: it is there at the end of the block."""
    if not isinstance(place, Path):
        with store_errors(place, "written"), _committed(file_system(place).open(place, "wb", autocommit=False)) as file:
            yield file
        return
    with disk_errors("writing", place):
        place.parent.mkdir(parents=True, exist_ok=True)
        staging = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with staging.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            staging.replace(place)
        finally:
            staging.unlink(missing_ok=True)


class Lines:
    """Lines that are kept until they are written elsewhere: in memory while they are few, else on this machine's disk."""

    def __init__(self, in_memory_bytes: int = 8 << 20) -> None:
        self._file = tempfile.SpooledTemporaryFile(in_memory_bytes)  # noqa: SIM115 - as long as they are
        self._count = 0

    def add(self, line: bytes) -> None:
        """One more, at the end."""
        self._file.seek(0, os.SEEK_END)
        self._file.write(line + b"\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        for line in self._file:
            yield line.rstrip(b"\n")


def remove_partial_files(place: Location) -> None:
    """Remove what `writing` was killed in the middle of; a store does not show such."""
    if isinstance(place, Path):
        for half in place.parent.glob(f".{glob.escape(place.name)}.*.tmp"):
            half.unlink(missing_ok=True)


@contextlib.contextmanager
def _committed(file: Any) -> Iterator[IO[bytes]]:
    # Left to itself, fsspec publishes what there is whether or not the block came to its end.
    try:
        yield file
        file.close()
        file.commit()
    except BaseException:
        with contextlib.suppress(Exception):
            file.close()
        with contextlib.suppress(Exception):
            file.discard()
        raise


def read(place: Location) -> bytes | None:
    """All of a file; None if there is none. StorageError where the store refuses."""
    with store_errors(place, "read"):
        try:
            return bytes(file_system(place).cat_file(str(place)))
        except (FileNotFoundError, NotADirectoryError):
            return None
