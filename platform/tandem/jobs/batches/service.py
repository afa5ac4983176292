"""Batches in the store of work: creation, lists, cancellation."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import timedelta

from tandem.api.openai import batches as wire
from tandem.config.serving.batches import BatchesConfig
from tandem.errors import FileError, UnknownFileError, UnknownJobError
from tandem.files.records import FileRecord, Purpose
from tandem.files.store import FileStore
from tandem.jobs.batches.stored import RUNNER, TYPE
from tandem.jobs.batches.view import PREFIX, batch_to_wire, has_counts
from tandem.jobs.file_jobs import submit_with_files
from tandem.jobs.work.queue import ItemQueue
from tandem.jobs.work.records import Job, JobSubmission, Resources
from tandem.jobs.work.states import REQUESTED, JobKind
from tandem.jobs.work.store import JobStore


class BatchService:
    """Batches of all tenants. Blocks; errors are those of the stores."""

    def __init__(self, store: JobStore, queue: ItemQueue, files: FileStore, config: BatchesConfig) -> None:
        self._store = store
        self._queue = queue
        self._files = files
        self._config = config

    def create(
        self,
        creation: wire.BatchCreation,
        *,
        tenant: str,
        key_id: str,
        models: Sequence[str] = (),
        idempotency_key: str | None = None,
    ) -> wire.Batch:
        """Create a batch. FileError for a file that is none of a batch, JobError where the tenant has too many batches.

        `models`: that the caller may use; empty: all.
        """
        file = self._file(creation.input_file_id, tenant)
        submission = JobSubmission(
            kind=JobKind.BATCH,
            id=f"{PREFIX}{secrets.token_hex(16)}",
            name=f"batch of {file.filename}"[:96],
            spec={
                "type": TYPE,
                "endpoint": creation.endpoint,
                "input_file_id": file.id,
                "location": file.location,
                "metadata": creation.metadata,
                "models": list(models),
                "output_lifetime_s": creation.output_expires_after and creation.output_expires_after.seconds,
            },
            tenant=tenant,
            key_id=key_id,
            runner=RUNNER,
            idempotency_key=idempotency_key,
            # Its requests use the engines that serve.
            resources=Resources(cpus_per_worker=0.0),
            deadline=self._store.now() + timedelta(seconds=wire.WINDOW_S),
        )
        most = self._config.max_active
        return self._to_wire(submit_with_files(self._store, self._files, submission, [file], max_active=most))

    def get(self, batch_id: str, tenant: str | None) -> wire.Batch:
        """One batch; UnknownJobError if the tenant has none of that id."""
        return self._to_wire(self._find(batch_id, tenant))

    def page(self, tenant: str | None, *, after: str | None, limit: int) -> wire.BatchList:
        """Batches of a tenant (None: of all), newest first."""
        page = self._store.page(tenant=tenant, kinds=[JobKind.BATCH], after=after, limit=limit)
        data = [self._to_wire(job) for job in page.jobs if job.spec.get("type") == TYPE]
        return wire.BatchList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=page.has_more,
        )

    def cancel(self, batch_id: str, tenant: str | None) -> wire.Batch:
        """Send no more requests of a batch; what is answered by then is in its output."""
        self._find(batch_id, tenant)
        return self._to_wire(self._store.cancel(batch_id, reason=REQUESTED))

    def _find(self, batch_id: str, tenant: str | None) -> Job:
        job = self._store.get(batch_id, tenant=tenant)
        if job.spec.get("type") != TYPE:
            raise UnknownJobError(f"There is no batch {batch_id[:120]!r}.")
        return job

    def _file(self, file_id: str, tenant: str) -> FileRecord:
        try:
            file = self._files.get(file_id, tenant)
        except UnknownFileError as error:
            raise UnknownFileError(f"input_file_id: {error}", param="input_file_id") from None
        if file.purpose is not Purpose.BATCH:
            raise FileError(
                f"input_file_id {file_id} has the purpose {file.purpose}; it must be batch. Upload it again with that one.",
                param="input_file_id",
            )
        return file

    def _to_wire(self, job: Job) -> wire.Batch:
        # Of one that has ended the result has the numbers: counting 50,000 rows for each batch of a list takes seconds.
        counts = {} if has_counts(job) else self._queue.counts(job.id)
        return batch_to_wire(job, counts, self._store.events(job.id))
