"""Jobs that read uploaded files, which cannot be deleted and do not expire until their jobs have ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sqlalchemy.orm import Session

from tandem.errors import JobError
from tandem.files.records import FileRecord
from tandem.files.store import FileStore
from tandem.files.tenants import lock_tenant
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.states import Action
from tandem.jobs.work.store import JobStore
from tandem.jobs.work.submissions import is_over_active

FILES = "files"
"""Key of the ids of its files in the specification of such a job."""


def submit_with_files(
    store: JobStore,
    files: FileStore,
    submission: JobSubmission,
    inputs: Iterable[FileRecord],
    *,
    max_active: int,
) -> Job:
    """Submit a job, which has an id, that reads files of its tenant.

    JobError where the tenant would have more than `max_active` jobs of this runner that have not ended; else raises what
    `FileStore.hold` and `JobStore.submit` do. There is no job and no file is held then.
    """
    job_id, file_ids = submission.id, [file.id for file in inputs]
    assert job_id is not None
    submission = replace(submission, spec={**submission.spec, FILES: file_ids})

    def hold(session: Session) -> None:
        _hold(files, session, job_id, submission.tenant, file_ids)
        # After the files: a deletion locks them in this order too.
        lock_tenant(session, submission.tenant)
        if is_over_active(session, submission.tenant, submission.runner, max_active):
            raise JobError(
                f"The tenant {submission.tenant} has {max_active} jobs of this kind that have not ended, and may have no more "
                "(max_active). Wait for the end of one, or cancel one."
            )

    return store.submit(submission, also=hold).job


def requeue_with_files(store: JobStore, files: FileStore, job_id: str, *, reason: str | None = None) -> Job:
    """Run a job again that has ended, and hold the files that it reads, if any; UnknownFileError where one is gone."""

    def hold(session: Session, job: Job) -> None:
        _hold(files, session, job.id, job.tenant, job.spec.get(FILES, ()))

    return store.change(job_id, Action.REQUEUE, reason=reason, also=hold)


def release_files(store: JobStore, files: FileStore, job_id: str) -> bool:
    """Release the files of a job if it has ended; whether it has."""
    return store.if_ended(job_id, lambda session: files.release(job_id, session=session))


def _hold(files: FileStore, session: Session, job_id: str, tenant: str, file_ids: Iterable[str]) -> None:
    # In one order: two transactions that hold the same files cannot wait for each other.
    for file_id in sorted(file_ids):
        files.hold(file_id, tenant, job_id, session=session)
