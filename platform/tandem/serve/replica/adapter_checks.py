"""Download and checks of an adapter's files on a replica's node, before its engine loads them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

from tandem.engine.protocol import AdapterRef
from tandem.errors import AdapterError
from tandem.registry.adapter_cache import AdapterCache
from tandem.registry.adapter_files import FILES, check_adapter, is_unchanged
from tandem.storage import is_remote


@dataclass(frozen=True, slots=True)
class AdapterChecker:
    """Checks of adapters for one base model; called in threads."""

    base: Path | None
    """Folder of the served model."""
    max_rank: int

    def __call__(self, adapter: AdapterRef) -> AdapterRef:
        """The adapter, with a path on this node.

        Raises AdapterError with the reason if it cannot be served, StorageError if its store does not answer.
        """
        if is_remote(adapter.path):
            folder = AdapterCache.open().get(adapter.path, adapter.digest or "")
        else:
            folder = Path(adapter.path)
        files = check_adapter(folder, self.base)
        if files.dora:
            raise AdapterError(f"{adapter.id} is a DoRA adapter, which vLLM does not serve. Merge it into its base.")
        if files.rank > self.max_rank:
            raise AdapterError(
                f"The adapter {adapter.id} has rank {files.rank}; its base is served with max_lora_rank {self.max_rank}. "
                "Serve it with a larger one."
            )
        if (
            adapter.digest
            and not is_remote(adapter.path)
            and not _is_unchanged(folder, adapter.digest, _file_stats(folder))
        ):
            raise AdapterError(
                f"The files of {adapter.id} in {folder} have changed since it was registered. Register them again: a new version."
            )
        return replace(adapter, path=str(folder))


def _file_stats(folder: Path) -> tuple[tuple[int, int], ...]:
    """Size and modification time of each file."""
    stats = [(folder / name).stat() for name in FILES]
    return tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)


@functools.lru_cache(maxsize=10_000)
def _is_unchanged(folder: Path, digest: str, file_stats: tuple[tuple[int, int], ...]) -> bool:
    return is_unchanged(folder, digest)
