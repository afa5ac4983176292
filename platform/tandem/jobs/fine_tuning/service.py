"""Fine-tuning jobs in the store of work: creation, requests of clients, and their state as OpenAI's API tells it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tandem.api.openai import fine_tuning as wire
from tandem.config import from_dict, to_dict
from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.errors import FileError, JobError, UnknownFileError, UnknownJobError
from tandem.files.records import FileRecord, FileStatus, Purpose
from tandem.files.store import FileStore
from tandem.jobs.file_jobs import submit_with_files
from tandem.jobs.fine_tuning.feed import FineTuningFeed
from tandem.jobs.fine_tuning.progress import ProgressReader, RunProgress
from tandem.jobs.fine_tuning.reports import checkpoints
from tandem.jobs.fine_tuning.stored import RUNNER, SLURM_RUNNER, TYPE, hyperparameters_of, is_fine_tuning
from tandem.jobs.fine_tuning.view import PREFIX, checkpoint_to_wire, events_to_wire, job_to_wire
from tandem.jobs.work.records import Job, JobSubmission, Resources
from tandem.jobs.work.states import REQUESTED, Action, JobKind
from tandem.jobs.work.store import JobStore
from tandem.observability.events import Event
from tandem.observability.journal import Journal
from tandem.settings import settings


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The model that a job adapts."""

    name: str
    """As the client gave it."""
    id: str
    """Of the registry, or the folder of one that is not registered."""
    max_rank: int
    """Largest rank of an adapter that its replicas take."""


class FineTuningService:
    """Fine-tuning jobs of all tenants. Blocks; errors are those of the stores."""

    def __init__(self, store: JobStore, files: FileStore, platform: FineTuningConfig) -> None:
        self._store = store
        self._files = files
        self._platform = platform
        self._progress = ProgressReader()

    # ---- requests ----

    def create(
        self,
        creation: wire.FineTuningCreation,
        base: Base,
        *,
        tenant: str,
        key_id: str,
        idempotency_key: str | None = None,
    ) -> wire.FineTuningJob:
        """Create a job.

        FileError for files that cannot be trained on, JobError for what the platform does not offer, or for too many jobs.
        """
        self._check_epochs(creation)
        files = {
            param: self._file(file_id, tenant, param)
            for param, file_id in (
                ("training_file", creation.training_file),
                ("validation_file", creation.validation_file),
            )
            if file_id is not None
        }
        submission = JobSubmission(
            kind=JobKind.TRAIN,
            id=f"{PREFIX}{secrets.token_hex(8)}",
            name=f"fine-tune {base.name}"[:96],
            spec=self._spec(creation, base, files),
            tenant=tenant,
            key_id=key_id,
            runner=SLURM_RUNNER if self._platform.runner == "slurm" else RUNNER,
            idempotency_key=idempotency_key,
            resources=self._resources(),
        )
        most = self._platform.max_active
        return self._to_wire(submit_with_files(self._store, self._files, submission, files.values(), max_active=most))

    def get(self, job_id: str, tenant: str | None) -> wire.FineTuningJob:
        """One job; UnknownJobError if the tenant has none of that id."""
        return self._to_wire(self._find(job_id, tenant))

    def page(
        self, tenant: str | None, *, after: str | None, limit: int, metadata: Mapping[str, str]
    ) -> wire.FineTuningJobList:
        """Jobs of a tenant (None: of all), newest first; with `metadata`, those that have these pairs."""
        found: list[Job] = []
        while True:
            page = self._store.page(tenant=tenant, kinds=[JobKind.TRAIN], after=after, limit=max(limit, 100))
            found += [job for job in page.jobs if is_fine_tuning(job) and _has(job, metadata)]
            if len(found) > limit or not page.has_more:
                break
            after = page.jobs[-1].id
        return wire.FineTuningJobList(
            data=[self._to_wire(job) for job in found[:limit]], has_more=len(found) > limit or page.has_more
        )

    def change(self, job_id: str, tenant: str | None, action: Action) -> wire.FineTuningJob:
        """Cancel, pause or resume a job; IllegalTransitionError where its state does not allow that."""
        self._find(job_id, tenant)
        return self._to_wire(self._store.change(job_id, action, reason=REQUESTED))

    def events(self, job_id: str, tenant: str | None) -> list[wire.FineTuningEvent]:
        """All events of a job so far, oldest first."""
        job = self._find(job_id, tenant)
        return events_to_wire(job, self._training_events(job))

    def event_feed(self, job_id: str, tenant: str | None) -> FineTuningFeed:
        """The events of a job until it ends."""
        job = self._find(job_id, tenant)
        return FineTuningFeed(self._store, job, _journal(job))

    def checkpoints(self, job_id: str, tenant: str | None) -> list[wire.FineTuningCheckpoint]:
        """The checkpoints that can be called as models, newest first."""
        job = self._find(job_id, tenant)
        found = checkpoints(self._training_events(job))
        kept = found[-self._platform_of(job).checkpoints :] if self._platform_of(job).checkpoints else []
        return [checkpoint_to_wire(job, checkpoint) for checkpoint in reversed(kept)]

    # ---- parts ----

    def _find(self, job_id: str, tenant: str | None) -> Job:
        job = self._store.get(job_id, tenant=tenant)
        if not is_fine_tuning(job):
            raise UnknownJobError(f"There is no fine-tuning job {job_id[:120]!r}.")
        return job

    def _check_epochs(self, creation: wire.FineTuningCreation) -> None:
        epochs = hyperparameters_of(creation).n_epochs
        if epochs is not None and epochs > self._platform.max_epochs:
            raise JobError(f"n_epochs is {epochs}; this platform allows {self._platform.max_epochs}. Lower it.")

    def _file(self, file_id: str, tenant: str, param: str) -> FileRecord:
        try:
            file = self._files.get(file_id, tenant)
        except UnknownFileError as error:
            raise UnknownFileError(f"{param}: {error}", param=param) from None
        if file.purpose is not Purpose.FINE_TUNE:
            raise FileError(
                f"{param} {file_id} has the purpose {file.purpose}; it must be fine-tune. Upload it again with that one.",
                param=param,
            )
        if file.status is FileStatus.ERROR:
            raise FileError(f"{param} {file_id} cannot be used: {file.status_details}", param=param)
        return file

    def _spec(self, creation: wire.FineTuningCreation, base: Base, files: Mapping[str, FileRecord]) -> dict[str, Any]:
        return {
            "type": TYPE,
            "request": creation.model_dump(exclude_none=True),
            "model": base.name,
            "base": base.id,
            "locations": {param: file.location for param, file in files.items()},
            "platform": to_dict(replace(self._platform, rank=min(self._platform.rank, base.max_rank))),
            "scheduling": {"priority": self._platform.priority, "time_limit": self._platform.time_limit},
            "worker_counts": self._platform.worker_counts,
            "nodes": self._platform.nodes,
            "gpus_per_node": self._platform.gpus_per_node,
        }

    def _resources(self) -> Resources:
        platform = self._platform
        if platform.runner == "slurm":
            # Slurm has nodes of its own: none of this cluster's are taken.
            return Resources(cpus_per_worker=0.0, min_workers=platform.workers, max_workers=platform.workers)
        return Resources(
            cpus_per_worker=platform.cpus_per_worker,
            gpus_per_worker=platform.gpus_per_worker,
            min_workers=platform.min_workers or platform.workers,
            max_workers=platform.workers,
        )

    def _platform_of(self, job: Job) -> FineTuningConfig:
        return from_dict(FineTuningConfig, job.spec["platform"])

    def _training_events(self, job: Job) -> list[Event]:
        return Journal(_journal(job)).read()

    def _to_wire(self, job: Job) -> wire.FineTuningJob:
        return job_to_wire(job, RunProgress() if job.started_at is None else self._progress.read(_journal(job)))


def _journal(job: Job) -> Path:
    return settings().jobs_dir / job.id / "events.jsonl"


def _has(job: Job, metadata: Mapping[str, str]) -> bool:
    own = job.spec["request"].get("metadata") or {}
    return all(own.get(key) == value for key, value in metadata.items())
