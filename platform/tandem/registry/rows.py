"""Rows of models and adapters as records, and the files that they name."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from tandem.db.schema import ModelRow
from tandem.registry.adapter_cache import AdapterCache
from tandem.registry.records import Kind, ModelRecord
from tandem.settings import settings
from tandem.storage import is_remote


def local_folder(record: ModelRecord) -> Path:
    """The folder of a record's files on this node, fetched from its store if need be.

    Raises AdapterError if they have changed, StorageError if the store does not answer.
    """
    return AdapterCache.open().get(record.uri, record.digest) if record.uri else record.path


def record_of(row: ModelRow) -> ModelRecord:
    """The record of a row."""
    return ModelRecord(
        name=row.name,
        version=row.version,
        kind=cast(Kind, row.kind),
        path=settings().adapter_cache / row.digest if is_remote(row.path) else Path(row.path),
        uri=row.path if is_remote(row.path) else None,
        digest=row.digest,
        base=row.base,
        rank=row.rank,
        max_length=row.max_length,
        tenant=row.name_row.tenant,
        lineage=row.lineage,
        created_at=row.created_at,
    )


def with_article(kind: str) -> str:
    """`an adapter`, `a model`."""
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def can_be_had(path: str) -> bool:
    """Whether a model's folder is there, or is one of the hub's cache, which downloads what is gone."""
    return Path(path).is_dir() or Path(path).is_relative_to(settings().hub_dir)


def is_there(path: str) -> bool:
    """Whether a version's files are where it was registered from; those in a store are taken to be."""
    return is_remote(path) or Path(path).is_dir()
