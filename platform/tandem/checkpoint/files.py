"""File access of torch.distributed.checkpoint for checkpoints on a disk or in an object store, with a digest of each file.

Every rank computes digests while it writes; the records go to rank 0 with the results of the write, and rank 0 commits.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tandem.checkpoint import folders
from tandem.checkpoint.folders import FileRecord, SavedState
from tandem.storage import Location, base_name, file_system, join


class CheckpointFileSystem(FileSystemBase):
    """Files of one folder, on a disk or in an fsspec store."""

    def __init__(self, folder: Location) -> None:
        self._store = file_system(folder)
        self.written: dict[str, FileRecord] = {}
        """Records of the files that were written through this object, by name."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file to read, or to write with a digest."""
        # A local file needs a file descriptor, for fsync.
        with open(path, mode) if isinstance(path, Path) else self._store.open(path, mode) as stream:
            if "r" in mode:
                yield stream
                return
            digested = _DigestingStream(stream)
            yield digested
            self.written[base_name(path)] = digested.record()

    def concat_path(self, path: Any, suffix: str) -> Any:
        """See torch's."""
        return join(path, suffix)

    def rename(self, path: Any, new_path: Any) -> None:
        """See torch's."""
        self._store.mv(str(path), str(new_path))
        self.written[base_name(new_path)] = self.written.pop(base_name(path))

    def init_path(self, path: Any) -> Any:
        """See torch's."""
        return path

    def mkdir(self, path: Any) -> None:
        """See torch's."""
        self._store.makedirs(str(path), exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """See torch's."""
        return True

    def exists(self, path: Any) -> bool:
        """See torch's."""
        return bool(self._store.exists(str(path)))

    def rm_file(self, path: Any) -> None:
        """See torch's."""
        self._store.rm_file(str(path))


class CheckpointWriter(FileSystemWriter):
    """Writes one checkpoint, and commits it when all ranks have written. It may run in the background."""

    def __init__(
        self,
        root: Location,
        state: SavedState,
        prune: Callable[[], None],
        on_commit: Callable[[Location], None] = lambda checkpoint: None,
    ) -> None:
        """`on_commit`, with the checkpoint's folder, and then `prune` run on rank 0 after the commit."""
        # An object store is durable without a sync.
        super().__init__("unused", sync_files=isinstance(root, Path))
        self._root, self._state, self._prune, self._on_commit = root, state, prune, on_commit
        self._files = CheckpointFileSystem(root)
        self.fs: Any = self._files
        self.path: Any = folders.staging_folder(root, state.step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See torch's: the folder is made by rank 0 in `prepare_global_plan`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See torch's: runs on rank 0 only, before any rank writes."""
        folders.open_staging(self._root, self._state.step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See torch's; the results include the records of this rank's files."""
        results = super().write_data(plan, planner).wait()
        results += [
            WriteResult(index=MetadataIndex(name), size_in_bytes=record.size, storage_data=record)
            for name, record in self._files.written.items()
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See torch's: rank 0 commits."""
        every = [result for rank in results for result in rank]
        records = {r.index.fqn: r.storage_data for r in every if isinstance(r.storage_data, FileRecord)}
        super().finish(metadata, [[r for r in every if not isinstance(r.storage_data, FileRecord)]])
        self._on_commit(folders.commit(self._root, self._state, records | self._files.written))
        # A failure to remove old checkpoints must not end a run; a store's client has errors of its own.
        with contextlib.suppress(Exception):
            self._prune()


class CheckpointReader(FileSystemReader):
    """Reads a checkpoint."""

    def __init__(self, checkpoint: Location) -> None:
        super().__init__("unused")
        self.fs: Any = CheckpointFileSystem(checkpoint)
        self.path: Any = checkpoint


class _DigestingStream:
    """A stream that computes the digest of the data written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._digest = hashlib.blake2b(digest_size=32)
        self._size = 0

    def write(self, data: Any) -> int:
        self._digest.update(data)
        # The length of a memoryview of larger items is not in bytes.
        self._size += memoryview(data).nbytes
        self._stream.write(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def record(self) -> FileRecord:
        return FileRecord(size=self._size, digest=self._digest.hexdigest())
