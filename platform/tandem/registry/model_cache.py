"""Node-local cache of base models from object stores: each node fetches a model once, however many replicas it has there.

A copy is known by the fingerprint of what the store lists (names, sizes, and entity tags or times), is written beside its final
place with the SHA-256 of each file, and appears by one rename. A process that uses a copy holds a lock on it, so that the least
recently used of the others make room.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tandem.errors import ConfigError, StorageError
from tandem.ids import digest
from tandem.private import make_private_folder
from tandem.settings import settings
from tandem.storage import disk_errors, file_system, free_bytes, join, store_errors

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")
"""Ends of names of files that hold weights."""
RECORD = ".tandem-copy.json"
"""Origin, sizes and digests of a copy's files."""
CHUNK_BYTES = 16 * 2**20
CONCURRENT_FILES = 4
TAGS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "updated")
"""What stores' clients call the property of a file that changes with its content."""

_used_copies: list[IO[bytes]] = []
"""Locks on the copies that this process uses, until it ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteModel:
    """A model's files in a store, as they are listed now."""

    uri: str
    sizes: dict[str, int]
    """Bytes of each file, by name."""
    fingerprint: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.sizes.values())


@dataclass(frozen=True, slots=True)
class ModelCache:
    """A folder of models that takes at most `limit_bytes`, beside copies that are in use."""

    root: Path
    limit_bytes: int

    @classmethod
    def open(cls) -> ModelCache:
        """The cache that this node's settings name."""
        config = settings()
        return cls(config.model_cache, int(config.model_cache_gib * 2**30))

    def fetch_metadata(self, remote: RemoteModel) -> Path:
        """A folder with all files of the model but its weights: enough for checks, and for the choice of an engine."""
        folder = self.root / "metadata" / remote.fingerprint
        if not folder.is_dir():
            names = [name for name in remote.sizes if not name.endswith(WEIGHTS)]
            staging = folder.with_name(f".{uuid.uuid4().hex}.tmp")
            with store_errors(remote.uri, "read"), disk_errors("fetching a model's config", staging):
                _bring(remote, names, staging, folder)
        return folder

    def use(self, fingerprint: str) -> Path | None:
        """The folder of a model that is here already, kept while this process runs; None: it is not, or not whole."""
        folder = self.root / fingerprint
        if not _is_whole(folder):
            return None
        lock = self._open_lock(fingerprint)
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not _is_whole(folder):  # another process has made room meanwhile
            lock.close()
            return None
        os.utime(folder)
        _used_copies.append(lock)
        return folder

    def fetch(self, remote: RemoteModel) -> Path:
        """A folder with all files of the model, kept while this process runs. StorageError where that cannot be."""
        folder = self.root / remote.fingerprint
        with disk_errors("fetching a model", self.root):
            make_private_folder(self.root)
            while (used := self.use(remote.fingerprint)) is None:
                # One process of a node fetches; the others wait for it.
                with self._lock(f"{remote.fingerprint}.fetch", fcntl.LOCK_EX):
                    if not _is_whole(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                        self._check_size(remote)
                        # Of a process that was killed while it fetched.
                        staging = self.root / f".{remote.fingerprint}.tmp"
                        shutil.rmtree(staging, ignore_errors=True)
                        self.make_room(remote.bytes)
                        self._check_space(remote)
                        with store_errors(remote.uri, "read"):
                            _bring(remote, list(remote.sizes), staging, folder)
        return used

    def make_room(self, needed_bytes: int) -> list[str]:
        """Remove the least recently used copies that no process uses, until so much fits; returns their fingerprints.

        It fits where the limit holds, and the disk has the space.
        """
        with self._lock("eviction", fcntl.LOCK_EX):
            copies = sorted(
                (path.stat().st_mtime, path)
                for path in self.root.iterdir()
                if path.is_dir() and path.name != "metadata" and not path.name.startswith(".")
            )
            sizes = {path: _size(path) for _, path in copies}
            total, removed = sum(sizes.values()) + needed_bytes, []
            for _, path in copies:
                if total <= self.limit_bytes and free_bytes(self.root) >= needed_bytes:
                    break
                with contextlib.suppress(BlockingIOError), self._lock(path.name, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    trash = path.with_name(f".{uuid.uuid4().hex}.old")
                    path.rename(trash)
                    shutil.rmtree(trash, ignore_errors=True)
                    removed.append(path.name)
                    total -= sizes[path]
            for leftover in self.root.glob(".*.old"):
                shutil.rmtree(leftover, ignore_errors=True)
        return removed

    def _check_space(self, remote: RemoteModel) -> None:
        if (free := free_bytes(self.root)) < remote.bytes:
            raise StorageError(
                f"{remote.uri} has {remote.bytes / 2**30:.2f} GiB, and the disk of {self.root} has {free / 2**30:.2f} GiB free "
                "beside models that are in use. Set TANDEM_CACHE to a folder on a larger disk of the node."
            )

    def _check_size(self, remote: RemoteModel) -> None:
        if remote.bytes > self.limit_bytes:
            raise StorageError(
                f"{remote.uri} has {remote.bytes / 2**30:.2f} GiB, and this node keeps {self.limit_bytes / 2**30:.2f} GiB of "
                "models. Raise TANDEM_MODEL_CACHE_GIB (on Kubernetes `scratch` of the pods)."
            )

    @contextlib.contextmanager
    def _lock(self, name: str, how: int) -> Iterator[None]:
        with self._open_lock(name) as lock:
            fcntl.flock(lock, how)
            yield

    def _open_lock(self, name: str) -> IO[bytes]:
        return (self.root / f".{name}.lock").open("ab")


def describe(uri: str) -> RemoteModel:
    """The model's files as the store lists them now. ConfigError where there is none, StorageError where it does not answer."""
    uri = uri.rstrip("/")
    with store_errors(uri, "read"):
        files = file_system(uri)
        try:
            listed = files.ls(uri, detail=True)
        except FileNotFoundError:
            listed = []
    entries = {
        name: entry
        for entry in listed
        if entry["type"] == "file" and not (name := entry["name"].rpartition("/")[2]).startswith(".") and name
    }
    if "config.json" not in entries or not any(name.endswith(".safetensors") for name in entries):
        missing = "config.json" if "config.json" not in entries else "*.safetensors"
        raise ConfigError(
            f"There is no model at {uri}: it has no {missing} (it holds {', '.join(sorted(entries)[:5]) or 'nothing'}). Name a "
            "folder in Hugging Face's format."
        )
    sizes = {name: int(entry["size"]) for name, entry in sorted(entries.items())}
    content = [[name, size, _tag(entries[name])] for name, size in sizes.items()]
    return RemoteModel(uri=uri, sizes=sizes, fingerprint=digest([uri, content])[:32])


def _bring(remote: RemoteModel, names: list[str], staging: Path, folder: Path) -> None:
    """Copy files of the model to `staging`, which becomes `folder` when all are there."""
    make_private_folder(staging)
    try:
        files = file_system(remote.uri)
        with ThreadPoolExecutor(CONCURRENT_FILES, thread_name_prefix="model-files") as pool:
            digests = list(pool.map(lambda name: _copy(files, str(join(remote.uri, name)), staging / name), names))
        # A model that is replaced while it is read would be a mixture of both for ever.
        if describe(remote.uri).fingerprint != remote.fingerprint:
            raise StorageError(f"{remote.uri} changed while it was read. Deploy the app again.")
        record = {"uri": remote.uri, "sizes": {name: remote.sizes[name] for name in names}}
        (staging / RECORD).write_text(json.dumps({**record, "sha256": dict(zip(names, digests, strict=True))}))
        with contextlib.suppress(OSError):  # another process has brought the same
            staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != RECORD)


def _tag(entry: dict[str, Any]) -> str:
    return next((str(entry[key]) for key in TAGS if entry.get(key)), "")


def _is_whole(folder: Path) -> bool:
    """Whether a copy is there with all its files at their sizes."""
    try:
        sizes = json.loads((folder / RECORD).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def _copy(files: Any, source: str, target: Path) -> str:
    """Copy one file of a store; returns its SHA-256."""
    sha256 = hashlib.sha256()
    with files.open(source, "rb", cache_type="none") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            sha256.update(chunk)
            writer.write(chunk)
    return sha256.hexdigest()
