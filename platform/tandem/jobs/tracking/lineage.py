"""Lineage of a job: base, datasets with their digests, parent, children and result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tandem.api import jobs as wire
from tandem.data.index import DatasetIndex
from tandem.errors import DataError
from tandem.jobs.tracking.history import folder_of
from tandem.jobs.work.records import Job
from tandem.jobs.work.states import JobKind
from tandem.jobs.work.store import JobStore

CHILDREN_SHOWN = 1000


def lineage_of(store: JobStore, job: Job) -> wire.TandemLineage:
    """The lineage of a job. Reads its folder and those of its datasets."""
    children = store.page(tenant=job.tenant, parent=job.id, limit=CHILDREN_SHOWN)
    is_training = job.kind is JobKind.TRAIN
    return wire.TandemLineage(
        job_id=job.id,
        parent=job.parent,
        children=[child.id for child in children.jobs],
        base=_base(job.spec) if is_training else None,
        datasets=list(_datasets(job)) if is_training else [],
        result_model=_text((job.result or {}).get("model")),
    )


def _base(spec: Mapping[str, Any]) -> str | None:
    model = spec.get("model")
    return _text(model.get("base")) if isinstance(model, Mapping) else _text(spec.get("base"))


def _datasets(job: Job) -> Iterator[wire.TandemDataset]:
    folder = folder_of(job)
    request, data = job.spec.get("request"), job.spec.get("data")
    if isinstance(request, Mapping) and folder is not None:
        # A fine-tuning job: it builds its datasets of uploaded files.
        if training := _text(request.get("training_file")):
            built = folder / "data" / "training"
            yield wire.TandemDataset(role="training", location=training, digest=_digest(built))
        if validation := _text(request.get("validation_file")):
            built = folder / "data" / "validation"
            yield wire.TandemDataset(role="validation", location=validation, digest=_digest(built))
    elif isinstance(data, Mapping):
        parts = [part.get("path") for part in data.get("mixture") or () if isinstance(part, Mapping)]
        for location in filter(None, map(_text, [data.get("path"), *parts])):
            yield wire.TandemDataset(role="training", location=location, digest=_digest(Path(location)))
        evaluation = job.spec.get("evaluation")
        if isinstance(evaluation, Mapping) and (held_out := _text(evaluation.get("data"))):
            yield wire.TandemDataset(role="validation", location=held_out, digest=_digest(Path(held_out)))


def _digest(folder: Path) -> str | None:
    """The digest of a dataset in a folder; None where it is not there, is damaged, or lies in an object store."""
    try:
        return DatasetIndex.load(folder).digest
    except (DataError, OSError):
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
