"""Jobs that read uploaded files."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.files.records import FileRecord
from tandem.files.store import FileStore
from tandem.jobs.work.records import Job, JobSubmission
from tandem.jobs.work.store import JobStore


def submit_with_files(
    store: JobStore, files: FileStore, submission: JobSubmission, inputs: Iterable[FileRecord]
) -> Job:
    """Submit a job, which has an id, that reads files of its tenant; they cannot be deleted until the job has ended.

    Raises what `FileStore.hold` and `JobStore.submit` do; no file is held then.
    """
    assert submission.id is not None
    try:
        # Before the job is there: a file that is deleted meanwhile would be missed by it.
        for file in inputs:
            files.hold(file.id, submission.tenant, submission.id)
        submitted = store.submit(submission)
    except BaseException:
        files.release(submission.id)
        raise
    if not submitted.is_new:
        files.release(submission.id)
    return submitted.job
