"""Storage by URI, with atomic publishing: a reader sees a whole folder or none of it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tandem.errors import StorageError, TandemError

CREDENTIALS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"}
"""Variables with the credentials of a store, by the scheme of its URIs."""
Location = str | Path
"""A local path, or a URI that fsspec knows, such as s3://bucket/runs."""


def is_remote(location: Location) -> bool:
    """Whether `location` is a URI of anything but a local path."""
    return isinstance(location, str) and urlsplit(location).scheme not in ("", "file")


def located(location: Location) -> Location:
    """An absolute Path for what is local, and the URI without its last slash for what is not."""
    return str(location).rstrip("/") if is_remote(location) else local_path(location)


def join(location: Location, *names: str) -> Location:
    """What lies below a `located` location."""
    return location.joinpath(*names) if isinstance(location, Path) else "/".join((location, *names))


def base_name(location: Location) -> str:
    """The last part of a path or URI."""
    return str(location).rstrip("/").rpartition("/")[2]


def file_system(location: Location) -> Any:
    """The fsspec file system of a location, which takes its paths and URIs as they are.

    Raises StorageError if what speaks to such a store is not installed.
    """
    # Imported here: few commands look at a store.
    from fsspec.core import url_to_fs

    try:
        # Other processes write there too: what a folder held a moment ago says nothing.
        return url_to_fs(str(location), **({"use_listings_cache": False} if is_remote(location) else {}))[0]
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        scheme = urlsplit(str(location)).scheme
        raise StorageError(
            f"{location} needs a package that is not installed here ({error}). "
            f"`pip install {package.get(scheme, 'PACKAGE')}` on every node brings it."
        ) from error
    except ValueError as error:
        raise StorageError(
            f"{location} is in no store that fsspec knows: {error}. Give a path or an s3:// URI."
        ) from error


@contextlib.contextmanager
def store_errors(location: Location, doing: str) -> Iterator[None]:
    """Turn what a disk or a store's client raises into a StorageError; `doing`: `read` or `written`."""
    try:
        yield
    except TandemError:
        raise
    # A store's client has errors of its own; a local one is the disk's.
    except Exception as error:
        if not is_remote(location):
            if not isinstance(error, OSError):
                raise
            reason = error.strerror or str(error)
            raise StorageError(
                f"{location} cannot be {doing}: {reason}. Choose another path, or check its owner."
            ) from error
        reason = f"{type(error).__name__}: {error}".rstrip(". ")
        raise StorageError(
            f"{location} cannot be {doing}: {reason}. Check that the bucket exists and that its credentials "
            f"({CREDENTIALS.get(urlsplit(str(location)).scheme, 'see its documentation')}) are in the environment of every node."
        ) from error


def check_writable(location: Location) -> None:
    """Raise StorageError unless files can be written below `location`; a local folder is made."""
    files, probe = file_system(location), join(location, f".probe-{uuid.uuid4().hex[:8]}")
    if isinstance(location, Path):
        with disk_errors("making a folder", location):
            try:
                location.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise StorageError(f"{location} is a file, and a folder is needed there: remove it.") from None
        return
    try:
        files.pipe_file(str(probe), b"tandem")
        files.rm_file(str(probe))
    except Exception as error:  # a store's client has errors of its own
        raise StorageError(
            f"Nothing can be written below {location}: {type(error).__name__}: {error}. Check that the bucket exists and that "
            "its credentials are in the environment of every node."
        ) from error


def upload_folder(folder: Path, target: Location, *, last: Iterable[str] = ()) -> None:
    """Copy the files of a folder to a path or URI, replacing what is there; those named in `last` come last.

    A reader that needs these files sees no copy before it is whole. Raises StorageError.
    """
    files, names = file_system(target), sorted(path.name for path in folder.iterdir() if path.is_file())
    with store_errors(target, "written"):
        files.makedirs(str(target), exist_ok=True)
        for name in last:
            if files.exists(old := str(join(target, name))):
                files.rm_file(old)
        for name in sorted(names, key=lambda name: name in last):
            files.put_file(str(folder / name), str(join(target, name)))


def local_path(uri: str | Path) -> Path:
    """The local path that `uri` names (`/x`, `x` or `file:///x`); StorageError for any other scheme."""
    text = str(uri)
    scheme = urlsplit(text).scheme
    if scheme in ("", "file"):
        return Path(text.removeprefix("file://")).expanduser().resolve()
    raise StorageError(f"{text} is not a local path. Mount it, or copy it below TANDEM_HOME.")


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that holds `path` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


@contextlib.contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn "no space left" and its kin into a StorageError with the numbers."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(path) / 2**20
            raise StorageError(
                f"The disk is full while {doing} at {path}: {free:.1f} MiB free. "
                "Free some space or set TANDEM_HOME to another disk, then run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise StorageError(f"Not allowed to write while {doing} at {path}. Check its owner and mode.") from error
        if error.errno == errno.ENOTDIR:
            raise StorageError(f"{path} lies below something that is a file. Set TANDEM_HOME to a folder.") from error
        raise


def require_space(path: Path, needed_bytes: int, what: str) -> None:
    """Refuse before work starts when `path`'s disk has less than `needed_bytes` free."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise StorageError(
            f"{what} needs about {needed_bytes / 2**20:,.0f} MiB at {path}, and {free / 2**20:,.0f} MiB are free. "
            "Free some space or set TANDEM_HOME to another disk."
        )


@contextlib.contextmanager
def publish_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it becomes `target` by one rename, on failure it goes away.

    Raises StorageError if `target` exists and `replace` is false, or if the disk fills up.
    """
    if target.exists() and not replace:
        raise StorageError(f"{target} exists already. Remove it first or choose another name.")
    with disk_errors("writing", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
        staging.mkdir()
        try:
            yield staging
            if target.exists():
                if not replace:
                    raise StorageError(f"{target} appeared while it was being written. Choose another name.")
                old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
                target.rename(old)
                staging.rename(target)
                shutil.rmtree(old, ignore_errors=True)
            else:
                staging.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    `mode`: its permission bits, of which the process's umask takes some away; 0o600 for what only its owner may read.
    """
    data = content.encode() if isinstance(content, str) else content
    with disk_errors("writing", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
