"""Checkpoint folders on a disk or in an object store: commit, listing, verification, removal. Imports no torch.

checkpoints/step-00000100/
    .metadata, __0_0.distcp, ...    torch.distributed.checkpoint
    state.json                      step, data cursor, metrics
    manifest.json                   size and digest of every other file; written last
checkpoints/.step-00000200.tmp/     staging: being written, or left by a run that died

A checkpoint is complete if it has a manifest. On a disk its folder is renamed from staging when everything is in it; in an object
store the manifest is the last object that is written. The manifest of a damaged checkpoint is renamed, and it is not used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tandem.config import CheckpointConfig
from tandem.errors import CheckpointError, StorageError
from tandem.storage import Location, base_name, disk_errors, file_system, join, located

STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"
DAMAGED_NAME = "manifest.damaged.json"
_NAME = re.compile(r"step-(\d{8,})")
_STAGING_NAME = re.compile(r"\.step-\d+\.tmp")
_CHUNK = 2**22
HIGHER_IS_BETTER = ("accuracy", "margin")
"""Suffixes of metrics of which higher values are better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedState:
    """The part of a checkpoint in state.json."""

    step: int
    tokens: int
    """Tokens trained on so far."""
    loss: float | None
    """Last reported."""
    world: int
    """Number of ranks that wrote it."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """Position in the data stream."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics at this step: `loss`, and `evaluation_...`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """A file's entry in the manifest."""

    size: int
    """Bytes."""
    digest: str
    """BLAKE2b, 32 bytes, in hexadecimal."""


def checkpoints_root(config: CheckpointConfig, job: Path) -> Location:
    """The folder of a job's checkpoints."""
    return job / "checkpoints" if config.path is None else join(located(config.path), job.name)


def step_folder(root: Location, step: int) -> Location:
    """The final folder of the checkpoint of `step`."""
    return join(root, f"step-{step:08d}")


def staging_folder(root: Location, step: int) -> Location:
    """The folder that it is written to; in an object store, which cannot rename, its final folder."""
    return root / f".step-{step:08d}.tmp" if isinstance(root, Path) else step_folder(root, step)


def step_of(checkpoint: Location) -> int:
    """The step of a checkpoint, by its name."""
    return int(base_name(checkpoint).removeprefix("step-"))


def list_complete(root: Location) -> list[Any]:
    """The complete checkpoints below `root`, oldest first: paths of a path, URIs of a URI."""
    files = file_system(root)
    return [folder for folder in _folders(root) if files.exists(str(join(folder, MANIFEST_NAME)))]


def latest(root: Location) -> Any:
    """The newest complete checkpoint, or None."""
    return next(reversed(list_complete(root)), None)


def open_staging(root: Location, step: int) -> Location:
    """An empty staging folder for the checkpoint of `step`; removes incomplete ones of runs that died."""
    files, staging = file_system(root), staging_folder(root, step)
    with _errors(root):
        if isinstance(root, Path):
            root.mkdir(parents=True, exist_ok=True)
        for name in _names(root):
            if _STAGING_NAME.fullmatch(name):
                _remove(files, join(root, name))
        if not isinstance(root, Path):
            _remove(files, staging)
        files.makedirs(str(staging), exist_ok=True)
    return staging


def commit(root: Location, state: SavedState, files: Mapping[str, FileRecord]) -> Location:
    """Commit the checkpoint of `state.step`; `files` are the records of its files. It is complete on return."""
    store, staging, final = file_system(root), staging_folder(root, state.step), step_folder(root, state.step)
    plain = json.dumps(asdict(state)).encode()
    records = {**files, STATE_NAME: FileRecord(size=len(plain), digest=digest_of(plain))}
    with _errors(root):
        store.pipe_file(str(join(staging, STATE_NAME)), plain)
        store.pipe_file(str(join(staging, MANIFEST_NAME)), _manifest(records))
        if isinstance(staging, Path) and isinstance(final, Path):
            for path in (staging / STATE_NAME, staging / MANIFEST_NAME, staging):
                _sync(path)
            if final.is_file():
                raise StorageError(
                    f"{final} is a file, where a checkpoint must get its name. Remove it, then run the job again."
                )
            if final.exists():
                _remove(store, final)
            staging.rename(final)
            _sync(final.parent)
    return final


def prune(root: Location, keep: int, best: str | None = None) -> None:
    """Remove checkpoints older than the newest `keep`, except the best by the metric `best`; incomplete ones, too."""
    complete = list_complete(root)
    retained = complete[-keep:]
    if best is not None:
        retained += [checkpoint for checkpoint in [best_checkpoint(complete, best)] if checkpoint is not None]
    files = file_system(root)
    for folder in _folders(root):
        if folder not in retained and retained and step_of(folder) < step_of(complete[-1]):
            _remove(files, folder)


def best_checkpoint(checkpoints: Iterable[Location], metric: str) -> Location | None:
    """The checkpoint with the best value of a metric, of equal ones the newest; None if none has a value."""
    sign = -1 if metric.endswith(HIGHER_IS_BETTER) else 1
    candidates: list[tuple[float, int, Location]] = []
    for checkpoint in checkpoints:
        with contextlib.suppress(CheckpointError):
            value = read_state(checkpoint).metrics.get(metric)
            if value is not None and value == value:
                candidates.append((sign * value, -step_of(checkpoint), checkpoint))
    return min(candidates, key=lambda candidate: candidate[:2])[2] if candidates else None


def read_state(checkpoint: Location) -> SavedState:
    """The state.json of a checkpoint; CheckpointError if it cannot be read."""
    path = join(checkpoint, STATE_NAME)
    try:
        return SavedState(**json.loads(file_system(checkpoint).cat_file(str(path))))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Remove {checkpoint}; the run then resumes from the previous one."
        ) from error


def find_damage(checkpoint: Location, share: int = 0, shares: int = 1) -> list[str]:
    """Damage of a complete checkpoint, file by file; of `shares` parts of the files of equal size, part `share`.

    Files are read in full and compared with their digests. Errors of a store that does not answer are raised.
    """
    files = file_system(checkpoint)
    try:
        records = read_manifest(checkpoint)
    except CheckpointError as error:
        return [str(error)] if share == 0 else []
    problems = []
    # The largest first, so that the parts have about equal sizes.
    for name in sorted(records, key=lambda n: (-records[n].size, n))[share::shares]:
        record = records[name]
        try:
            size, digest = 0, _hasher()
            with files.open(str(join(checkpoint, name)), "rb") as stream:
                while part := stream.read(_CHUNK):
                    size += len(part)
                    digest.update(part)
        except FileNotFoundError:
            problems.append(f"{name} is missing")
            continue
        except OSError as error:
            # A file that a disk cannot read is lost; a store that does not answer may still have it.
            if not isinstance(checkpoint, Path):
                raise
            problems.append(f"{name} cannot be read ({error})")
            continue
        if size != record.size:
            problems.append(f"{name} has {size:,} bytes of {record.size:,}")
        elif digest.hexdigest() != record.digest:
            problems.append(f"{name} has other bytes than were written")
    return problems


def list_incomplete(root: Location) -> list[Any]:
    """Folders with the name of a checkpoint and without any manifest, oldest first."""
    files = file_system(root)
    names = (MANIFEST_NAME, DAMAGED_NAME)
    return [folder for folder in _folders(root) if not any(files.exists(str(join(folder, name))) for name in names)]


def quarantine(checkpoint: Location) -> None:
    """Rename the manifest of a damaged checkpoint, so that it is not used; its files stay until a later save removes them."""
    files, manifest = file_system(checkpoint), str(join(checkpoint, MANIFEST_NAME))
    with _errors(checkpoint):
        files.pipe_file(str(join(checkpoint, DAMAGED_NAME)), files.cat_file(manifest))
        files.rm_file(manifest)


def read_manifest(checkpoint: Location) -> dict[str, FileRecord]:
    """The records of a checkpoint's files, by name; CheckpointError if the manifest is damaged."""
    path = join(checkpoint, MANIFEST_NAME)
    try:
        content = file_system(checkpoint).cat_file(str(path))
    except OSError as error:
        if isinstance(path, Path) or isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{MANIFEST_NAME} is damaged ({error})") from error
        raise
    try:
        manifest = json.loads(content)
        if manifest["digest"] != digest_of(_encoded(manifest["files"])):
            raise ValueError("its digest is of other files")
        return {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} is damaged ({error})") from error


def digest_of(content: bytes) -> str:
    """The digest that manifests hold."""
    digest = _hasher()
    digest.update(content)
    return str(digest.hexdigest())


def _hasher() -> Any:
    # 1.3 GB/s on one core, SHA-256 0.7 GB/s.
    return hashlib.blake2b(digest_size=32)


def _manifest(records: Mapping[str, FileRecord]) -> bytes:
    files = {name: asdict(record) for name, record in sorted(records.items())}
    return json.dumps({"files": files, "digest": digest_of(_encoded(files))}, indent=1).encode()


def _encoded(files: Any) -> bytes:
    return json.dumps(files, sort_keys=True).encode()


def _folders(root: Location) -> list[Location]:
    return sorted((join(root, name) for name in _names(root) if _NAME.fullmatch(name)), key=step_of)


def _names(root: Location) -> list[str]:
    try:
        return sorted({base_name(path) for path in file_system(root).ls(str(root), detail=False)})
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(files: Any, folder: Location) -> None:
    """Remove a checkpoint, its manifest first: a half-removed checkpoint is incomplete."""
    for name in (MANIFEST_NAME, DAMAGED_NAME):
        with contextlib.suppress(FileNotFoundError):
            files.rm_file(str(join(folder, name)))
    with contextlib.suppress(FileNotFoundError):
        files.rm(str(folder), recursive=True)


def _sync(path: Path) -> None:
    """fsync a file or a folder, against a loss of power."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _errors(location: Location) -> contextlib.AbstractContextManager[None]:
    return disk_errors("writing a checkpoint", location) if isinstance(location, Path) else contextlib.nullcontext()


def is_complete_export(target: Path) -> bool:
    """Whether `target` holds a complete exported model or adapter."""
    adapter = (target / "adapter_config.json").exists() and (target / "adapter_model.safetensors").exists()
    return adapter or ((target / "config.json").exists() and any(target.glob("*.safetensors")))
