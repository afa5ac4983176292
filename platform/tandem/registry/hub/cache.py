"""Local cache of the hub in huggingface_hub's layout: `blobs/` by digest, `snapshots/COMMIT/` of links to them.

A blob has its final name only once its digest has been verified, so what is there needs no second look. A download takes a lock
on its repository: of several processes, also on several nodes that share the folder, one downloads and the others wait. An
interrupted download continues at the next byte. `tandem.json` holds the hub's last answers (the commit of each branch, the files
of each commit), for times when the hub cannot be reached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tandem.errors import HubError, HubUnreachableError
from tandem.ids import file_digest
from tandem.private import is_shared, make_shared_folder
from tandem.registry.hub.client import Client, Kind
from tandem.registry.hub.report import Report
from tandem.registry.hub.selection import RepoFile
from tandem.settings import settings
from tandem.storage import disk_errors, require_space, write_atomic

STATE_FILE = "tandem.json"
PARALLEL_FILES = 4
LOCK_POLL_S = 0.2
UNFINISHED_SUFFIX = ".incomplete"


@dataclass(kw_only=True)
class RepoState:
    """Facts about a repository, as of the last answer from the hub."""

    revisions: dict[str, str] = field(default_factory=dict)
    """Commit of each branch or tag, as of `seen`."""
    commits: dict[str, tuple[RepoFile, ...]] = field(default_factory=dict)
    """All files of a commit, here or not."""
    seen: dict[str, str] = field(default_factory=dict)
    """Time of the hub's last answer about each revision: ISO 8601, UTC."""


@dataclass(frozen=True, slots=True)
class RepoCache:
    """The files of one repository."""

    folder: Path

    @classmethod
    def of(cls, repo: str, kind: Kind) -> RepoCache:
        """The cache of a repository in this home."""
        return cls(settings().hub_dir / f"{kind}s--{repo.replace('/', '--')}")

    def load_state(self) -> RepoState:
        """Facts about the repository so far; empty where the file is missing or damaged."""
        try:
            values = json.loads((self.folder / STATE_FILE).read_text())
            commits = {commit: tuple(RepoFile(**f) for f in files) for commit, files in values["commits"].items()}
            return RepoState(revisions=dict(values["revisions"]), commits=commits, seen=dict(values["seen"]))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return RepoState()

    def save_listing(self, revision: str, commit: str, files: Sequence[RepoFile]) -> None:
        """Save the hub's answer; for the holder of the lock."""
        state = self.load_state()
        state.commits[commit] = tuple(files)
        if revision != commit:
            state.revisions[revision] = commit
            state.seen[revision] = datetime.now(UTC).isoformat(timespec="seconds")
        # A commit that no revision is any more, and of which nothing is here, is of no use.
        used_commits = {commit, *state.revisions.values()}
        state.commits = {
            other: other_files
            for other, other_files in state.commits.items()
            if other in used_commits or self.snapshot(other).is_dir()
        }
        with disk_errors("writing", self.folder):
            _make_folder(self.folder)
        write_atomic(self.folder / STATE_FILE, json.dumps(asdict(state)))

    def snapshot(self, commit: str) -> Path:
        """The folder of a commit's files, there or not."""
        return self.folder / "snapshots" / commit

    def missing(self, commit: str, files: Sequence[RepoFile]) -> list[RepoFile]:
        """The files of a commit that are missing or incomplete here."""
        snapshot = self.snapshot(commit)
        return [file for file in files if _size(snapshot / file.path) != file.size]

    def fetch(self, client: Client, commit: str, files: Sequence[RepoFile], report: Report) -> Path:
        """Download the missing `files`, and return the commit's folder. For the holder of the lock.

        StorageError if the disk lacks room, before anything is downloaded; HubError for a file with another digest than the hub
        says; HubUnreachableError, which keeps what has come.
        """
        blobs = {file.key: file for file in self.missing(commit, files) if _size(self._blob(file)) != file.size}
        total_bytes = sum(file.size for file in blobs.values())
        present_bytes = sum(min(_size(self._partial_file(file)) or 0, file.size) for file in blobs.values())
        with disk_errors(f"downloading {client.repo}", self.folder):
            if blobs:
                name = (
                    f"{client.repo} ({total_bytes / 2**20:,.0f} MiB, {present_bytes / 2**20:,.0f} of them here)"
                    if present_bytes
                    else client.repo
                )
                require_space(self.folder, total_bytes - present_bytes, name)
                _make_folder(self.folder / "blobs")
                with report.downloading(f"{client.repo} at {commit[:12]}", total_bytes, present_bytes) as on_bytes:
                    self._download(client, commit, list(blobs.values()), on_bytes)
            for file in files:
                self._link(file, self.snapshot(commit) / file.path)
        return self.snapshot(commit)

    @contextlib.contextmanager
    def lock(self, report: Report) -> Iterator[None]:
        """Exclusive lock on this repository's folder for the length of a block; waits for other processes that download.

        The kernel, or the file server, lets go of it when its holder dies.
        """
        path = self.folder.parent / ".locks" / f"{self.folder.name}.lock"
        with disk_errors("locking the hub's cache", path):
            _make_folder(path.parent)
            file = _open_lock(path)
        with file:
            has_waited = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not has_waited:
                        report.note(f"Another process is downloading {self.folder.name}; waiting for it")
                    has_waited = True
                    # A wait in the kernel would not let a Ctrl-C through where this is not the main thread.
                    time.sleep(LOCK_POLL_S)
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
                        raise
                    report.note(f"{path} cannot be locked ({error.strerror}): download from one process at a time")
                    break
            yield

    def _blob(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / file.key

    def _partial_file(self, file: RepoFile) -> Path:
        return self.folder / "blobs" / f"{file.key}{UNFINISHED_SUFFIX}"

    def _download(self, client: Client, commit: str, files: list[RepoFile], on_bytes: Any) -> None:
        has_ended = threading.Event()
        # It logs each broken connection; here only the error that ends a download is reported.
        logging.getLogger("huggingface_hub.file_download").setLevel(logging.ERROR)

        def count(size: int) -> None:
            if has_ended.is_set():
                raise HubError("The download was interrupted.")
            on_bytes(size)

        with ThreadPoolExecutor(PARALLEL_FILES, thread_name_prefix="hub") as threads:
            # The small ones first: a repository without access then fails at once.
            futures = [
                threads.submit(self._download_file, client, commit, file, count)
                for file in sorted(files, key=lambda file: file.size)
            ]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                has_ended.set()
                threads.shutdown(cancel_futures=True, wait=False)
                raise

    def _download_file(self, client: Client, commit: str, file: RepoFile, count: Any) -> None:
        part = self._partial_file(file)
        if part.exists() and not os.access(part, os.W_OK):
            part.unlink()  # another user's interrupted download
        while True:
            old_size = _size(part) or 0
            try:
                client.download(file, commit, part, count)
                break
            except HubUnreachableError as error:
                # Connections of a long download break: it continues as long as each attempt brings some bytes.
                if (new_size := _size(part) or 0) > old_size:
                    continue
                raise HubUnreachableError(
                    f"{error}; {new_size / 2**20:,.1f} of {file.size / 2**20:,.1f} MiB of {client.repo}/{file.path} are here "
                    "and are kept"
                ) from error
            except OSError as error:
                if type(error) is OSError and error.errno is None:  # huggingface_hub's own, of a wrong size
                    raise HubError(
                        f"{client.repo}/{file.path} came incomplete: {error}. Run the command again."
                    ) from error
                raise
        digest = file_digest(part) if file.sha256 else git_digest(part)
        if digest != file.key:
            part.unlink()
            raise HubError(
                f"{client.repo}/{file.path} came with another content than the hub says: its digest is {digest[:12]} and not "
                f"{file.key[:12]}. Nothing of it is kept; run the command again."
            )
        part.replace(self._blob(file))

    def _link(self, file: RepoFile, link: Path) -> None:
        if _size(link) == file.size:
            return
        _make_folder(link.parent)
        target = os.path.relpath(self._blob(file), link.parent)
        staging = link.with_name(f".{link.name}.link")
        staging.unlink(missing_ok=True)
        staging.symlink_to(target)
        staging.replace(link)


def git_digest(path: Path) -> str:
    """git's id of a file's content: sha1 (hex) over "blob SIZE", a zero byte and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _make_folder(path: Path) -> None:
    """Create a folder of the cache; in a home that a group shares, its members can write there."""
    make_shared_folder(path, settings().root)


def _open_lock(path: Path) -> IO[bytes]:
    """A lock file, created if needed. One that another user made read-only is opened for reading, which is enough for flock."""
    try:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")  # noqa: SIM115 - the caller closes it
    except PermissionError:
        return path.open("rb")
    if is_shared(settings().root) and os.fstat(file.fileno()).st_uid == os.geteuid():
        # A file server takes an exclusive lock only on a file that is open for writing.
        os.fchmod(file.fileno(), 0o664)
    return file


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
