"""Node-local cache of adapters from object stores: keyed and verified by digest, bounded, least recently used evicted first.

Several processes share the folder. A copy appears by one rename and goes by one, and is not removed within a minute of its last
use, so an engine that was just told where it is still finds it there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import AdapterError, StorageError
from tandem.private import make_private_folder
from tandem.registry.adapter_files import CONFIG, FILES, WEIGHTS, adapter_digest
from tandem.settings import settings
from tandem.storage import disk_errors, file_system, join, require_space

RECENT_USE_S = 60.0
"""Seconds for which a copy stays after its last use, even above the limit."""


@dataclass(frozen=True, slots=True)
class AdapterCache:
    """A folder of adapters that takes at most `limit_bytes`."""

    root: Path
    limit_bytes: int

    @classmethod
    def open(cls) -> AdapterCache:
        """The cache that this node's settings name."""
        config = settings()
        return cls(config.adapter_cache, int(config.adapter_cache_gib * 2**30))

    def folder_of(self, digest: str) -> Path:
        """The folder of the adapter of a digest, there or not."""
        return self.root / digest

    def get(self, uri: str, digest: str) -> Path:
        """The folder of the adapter at `uri`, fetched if it is not here.

        Raises AdapterError if what is there now has another digest, StorageError if the store does not answer.
        """
        folder = self.folder_of(digest)
        with contextlib.suppress(FileNotFoundError):
            os.utime(folder)
            return folder
        folder, new_digest = self.fetch(uri)
        if new_digest != digest:
            raise AdapterError(
                f"{uri} has changed since it was registered: its digest was {digest[:12]} and is {new_digest[:12]}. Register it "
                "again."
            )
        return folder

    def fetch(self, uri: str) -> tuple[Path, str]:
        """Bring the adapter at `uri` here; its folder and its digest. Errors as `get`."""
        files = file_system(uri)
        try:
            sizes = {
                name: int(files.info(str(join(uri, name)))["size"])
                for name in FILES
                if files.exists(str(join(uri, name)))
            }
            if missing := [name for name in FILES if name not in sizes]:
                other_names = (
                    [Path(str(path)).name for path in files.ls(uri, detail=False)] if files.exists(uri) else []
                )
                raise AdapterError(
                    f"{uri} holds no {' and no '.join(missing)}, so it is not an adapter that can be served (it holds "
                    f"{', '.join(sorted(other_names)[:5]) or 'nothing'}). Save it with peft's save_pretrained()."
                )
            if sum(sizes.values()) > self.limit_bytes:
                raise AdapterError(
                    f"{uri} has {sum(sizes.values()) / 2**30:.2f} GiB, and this node keeps {self.limit_bytes / 2**30:.2f} GiB of "
                    "adapters. Raise TANDEM_ADAPTER_CACHE_GIB."
                )
            staging = self.root / f".{uuid.uuid4().hex}.tmp"
            with disk_errors("fetching an adapter", self.root):
                make_private_folder(staging)
                require_space(self.root, sum(sizes.values()), "The adapter")
                try:
                    for name in (CONFIG, WEIGHTS):
                        files.get_file(str(join(uri, name)), str(staging / name))
                    digest = adapter_digest(staging)
                    try:
                        staging.rename(self.folder_of(digest))
                    except OSError:
                        # Another process brought it at the same time.
                        if not self.folder_of(digest).is_dir():
                            raise
                finally:
                    shutil.rmtree(staging, ignore_errors=True)
        except (AdapterError, StorageError):
            raise
        except Exception as error:  # a store's client has errors of its own
            raise StorageError(
                f"{uri} cannot be read: {type(error).__name__}: {error}. Check it and its credentials."
            ) from error
        self.make_room(keep=digest)
        return self.folder_of(digest), digest

    def make_room(self, keep: str = "") -> list[str]:
        """Remove the least recently used copies until the limit holds; returns their digests."""
        copies: list[tuple[float, int, Path]] = []
        for folder in self.root.iterdir():
            with contextlib.suppress(OSError):
                if not folder.name.startswith("."):
                    copies.append(
                        (folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir()), folder)
                    )
                elif time.time() - folder.stat().st_mtime > 3600.0:
                    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        total = sum(size for _, size, _ in copies)
        removed = []
        for last_used, size, folder in sorted(copies):
            if total <= self.limit_bytes:
                break
            if folder.name != keep and time.time() - last_used > RECENT_USE_S:
                trash = folder.with_name(f".{uuid.uuid4().hex}.old")
                with contextlib.suppress(OSError):
                    folder.rename(trash)
                    shutil.rmtree(trash, ignore_errors=True)
                    removed.append(folder.name)
                    total -= size
        return removed
