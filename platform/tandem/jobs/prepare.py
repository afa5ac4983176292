"""Preparation of a training job: checks the config against data and base model, and makes the job's id and folder.

The id is a hash of config, data and base: the same submission is the same job, and resumes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import yaml

from tandem.config import DataConfig, TrainConfig, check_elastic, to_dict, with_workers, worker_counts
from tandem.config.training.layout import ModelShape, check_layout
from tandem.data.index import check_tokenizers, find_dataset, find_parts, parts_digest
from tandem.errors import ConfigError
from tandem.ids import job_id
from tandem.jobs.folder import JobFolder
from tandem.registry import Registry, find_base
from tandem.settings import settings
from tandem.storage import disk_errors, require_space, write_atomic

SPACE_NEEDED = 64 * 2**20
"""Bytes that must be free on the disk before a job starts."""

NON_CONTENT_KEYS = (
    "parallel",
    "checkpoint",
    "faults",
    "log_every",
    "metrics",
    "scheduling",
    "register",
    "export_to",
)
"""Config keys that change how a job runs or reports, but not its result: they are not part of its id."""

READER_KEYS = ("readers", "reader_tasks", "read_ahead", "prefetch_batches", "skip_damaged")
"""Such keys of `data`."""


def prepare(config: TrainConfig, *, compared: Collection[str] = ()) -> JobFolder:
    """Check `config` and write the folder of its job; the same config gives the same folder.

    `compared`: keys of `NON_CONTENT_KEYS` (or "data", for `READER_KEYS`) that do make another job: a sweep that tries several
    layouts has to run them all.
    Raises DataError, ConfigError, LayoutError, RegistryError or UnknownModelError with what to change.
    """
    parts = find_parts(config.data)
    base = find_base(config.model.base) if config.model.base else None
    reference = find_base(config.dpo.reference, "dpo.reference") if config.dpo and config.dpo.reference else None
    for max_length in (
        base.max_length if base else config.model.max_length,
        reference.max_length if reference else None,
    ):
        if max_length and config.data.sequence_length > max_length:
            raise ConfigError(
                f"data.sequence_length ({config.data.sequence_length}) is longer than the model takes ({max_length}). "
                f"Lower it to {max_length}, or train a model with a larger model.max_length."
            )
    for part in parts:
        config.check_kind(part.index.kind, str(part.location))
    if base is None and config.model.tokenizer is None:
        check_tokenizers(parts)
    check_elastic(config)
    for size in worker_counts(config):
        check_layout(base.shape() if base else ModelShape.of(config.model), with_workers(config, size))
    if reference:
        check_layout(reference.shape(), config)
    if config.register:
        Registry.open().check_owner(config.name, config.tenant)
    evaluation_index = None
    evaluation = config.evaluation
    if evaluation is not None and evaluation.data is not None:
        found = find_dataset(evaluation.data)
        evaluation_index = found.index
        config.check_kind(evaluation_index.kind, str(found.location))
        if any(found.location == part.location for part in parts):
            raise ConfigError(
                f"evaluation.data is {found.location}, which is trained on. Name another dataset, or unset it."
            )
        evaluation = replace(evaluation, data=str(found.location))
    resolved = replace(
        config,
        data=_with_resolved_paths(config.data, [str(part.location) for part in parts]),
        model=replace(config.model, base=base.id if base else None),
        dpo=replace(config.dpo, reference=reference.id) if config.dpo and reference else config.dpo,
        evaluation=evaluation,
    )
    plain = to_dict(resolved)
    content = {k: v for k, v in plain.items() if k not in NON_CONTENT_KEYS or k in compared}
    left_out = ("path", "mixture") if "data" in compared else ("path", "mixture", *READER_KEYS)
    for key in ("tenant", "extends"):
        # As before there were these keys: the ids of jobs of then stay.
        if content[key] is None:
            del content[key]
    content["data"] = {k: v for k, v in plain["data"].items() if k not in left_out}
    if content["evaluation"] is not None:
        content["evaluation"] = {**content["evaluation"], "data": evaluation_index.digest if evaluation_index else None}
    digests = [model.digest() if model else None for model in (base, reference)]
    made_of = [content, parts_digest(parts), parts[0].index.tokenizer_digest, *digests]
    job = JobFolder(settings().jobs_dir / job_id(config.name, made_of))
    require_space(job.path, SPACE_NEEDED, f"The job {job.id}")
    with disk_errors("writing the job's config", job.path):
        job.path.mkdir(parents=True, exist_ok=True)
        write_atomic(job.path / "config.yaml", yaml.safe_dump(plain, sort_keys=False))
    return job


def _with_resolved_paths(data: DataConfig, folders: list[str]) -> DataConfig:
    """The data config with absolute folders."""
    if data.path:
        return replace(data, path=folders[0])
    named = zip(data.mixture, folders, strict=True)
    return replace(data, mixture=tuple(replace(part, path=folder) for part, folder in named))
