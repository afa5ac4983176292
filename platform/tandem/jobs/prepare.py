"""Checks a training config against what exists, before anything starts, and gives the job its id and folder.

A job's id is a hash of its config, its data and its base: the same submission is the same job, and goes on where it was.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from tandem.config import TrainConfig, to_dict
from tandem.data.index import DatasetIndex
from tandem.errors import ConfigError, DataError, UnknownModelError, did_you_mean
from tandem.ids import folder_digest, job_id
from tandem.jobs.folder import JobFolder
from tandem.registry import Registry
from tandem.settings import settings
from tandem.storage import disk_errors, require_space, write_atomic

SPACE_NEEDED = 64 * 2**20
"""Bytes that must be free before a job starts; what is known to fail later is refused now."""


def prepare(config: TrainConfig) -> JobFolder:
    """Check `config` and write the folder of its job; the same config gives the same folder.

    Raises DataError, ConfigError or UnknownModelError with what to change.
    """
    folder, index = find_dataset(config.data.path)
    base, base_digest, max_length = find_base(config)
    if config.data.sequence_length > max_length:
        raise ConfigError(
            f"data.sequence_length ({config.data.sequence_length}) is longer than the model takes ({max_length}). "
            f"Lower it to {max_length}, or train a model with a larger model.max_length."
        )
    if config.data.loss_on == "answers" and index.kind != "pairs":
        raise ConfigError(
            f"data.loss_on is 'answers', but {folder} holds plain text without answers. Set data.loss_on to 'all'."
        )
    resolved = replace(
        config, data=replace(config.data, path=str(folder)), model=replace(config.model, base=base or config.model.base)
    )
    plain = to_dict(resolved)
    content = {k: v for k, v in plain.items() if k not in ("parallel", "checkpoint", "log_every")}
    content["data"] = {k: v for k, v in plain["data"].items() if k not in ("path", "readers", "prefetch_batches")}
    job = JobFolder(
        settings().jobs_dir / job_id(config.name, [content, index.digest, index.tokenizer_digest, base_digest])
    )
    require_space(job.path, SPACE_NEEDED, f"The job {job.id}")
    with disk_errors("writing the job's config", job.path):
        job.path.mkdir(parents=True, exist_ok=True)
        write_atomic(job.path / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    return job


def find_dataset(path: str) -> tuple[Path, DatasetIndex]:
    """The folder and index of a dataset, by path or by its name below TANDEM_HOME/data."""
    named = settings().data_dir / path
    folder = named if "/" not in path and named.is_dir() else Path(path).expanduser().resolve()
    if not folder.is_dir():
        known = [p.name for p in settings().data_dir.iterdir()] if settings().data_dir.is_dir() else []
        raise DataError(
            f"No dataset at {folder}.{did_you_mean(Path(path).name, known)} "
            "Make one: `tandem data build SOURCE NAME` (known here: " + (", ".join(sorted(known)) or "none") + ")."
        )
    return folder, DatasetIndex.load(folder)


def find_base(config: TrainConfig) -> tuple[str | None, str | None, int]:
    """The base's id or folder, its digest, and the positions it takes; for a new model, (None, None, its max_length)."""
    base = config.model.base
    if base is None:
        return None, None, config.model.max_length
    folder = Path(base).expanduser()
    if (folder / "config.json").exists():
        return str(folder.resolve()), folder_digest(folder), _positions(folder)
    try:
        record = Registry.open().resolve(base)
    except UnknownModelError as error:
        raise UnknownModelError(f"model.base: {error}") from error
    if record.kind != "model":
        raise ConfigError(
            f"model.base is {record.id}, an adapter of {record.base}. Name the model itself, or export a merged one."
        )
    return record.id, record.digest, record.max_length or _positions(record.path)


def _positions(folder: Path) -> int:
    import json

    found = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    return int(found) if found else 2**31
