"""Jobs that read files: held from the submission until the end, and again when the job is queued again. On both databases."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy.orm import Session

from tandem.errors import FileInUseError, JobError, RegistryUnreachableError, UnknownFileError
from tandem.files.records import FileRecord, NewFile, Purpose
from tandem.files.store import FileStore
from tandem.jobs.file_jobs import release_files, requeue_with_files, submit_with_files
from tandem.jobs.work.records import JobSubmission
from tandem.jobs.work.states import JobKind, State
from tandem.jobs.work.store import JobStore

SUBMISSION = JobSubmission(
    kind=JobKind.BATCH, name="b", id="b-1", spec={}, tenant="lab", idempotency_key="k", runner="openai_batch"
)


@pytest.fixture
def files(url: str) -> Iterator[FileStore]:
    with FileStore(url) as opened:
        yield opened


def add(files: FileStore, file_id: str) -> FileRecord:
    new = NewFile(
        id=file_id, tenant="lab", key_id="", purpose=Purpose.BATCH, filename="a.jsonl", size_bytes=1, sha256="0" * 64,
        location=f"/files/{file_id}",
    )  # fmt: skip
    return files.add(new, quota_bytes=10**9)


@pytest.fixture
def file(files: FileStore) -> FileRecord:
    return add(files, "file-1")


def test_a_job_that_is_queued_again_holds_its_files_again(store: JobStore, files: FileStore, file: FileRecord) -> None:
    submit_with_files(store, files, SUBMISSION, [file], max_active=2)
    assert not release_files(store, files, "b-1")
    store.cancel("b-1")
    assert release_files(store, files, "b-1")
    assert requeue_with_files(store, files, "b-1").state is State.QUEUED
    with pytest.raises(FileInUseError):
        files.delete(file.id, "lab")
    store.cancel("b-1")
    assert release_files(store, files, "b-1")
    files.delete(file.id, "lab")
    with pytest.raises(UnknownFileError):
        requeue_with_files(store, files, "b-1")
    assert store.get("b-1").state is State.CANCELLED


def test_a_file_is_held_or_released_when_its_job_is_queued_again_at_the_release(
    store: JobStore, files: FileStore, file: FileRecord
) -> None:
    submit_with_files(store, files, SUBMISSION, [file], max_active=2)
    for _ in range(20):
        store.cancel("b-1")
        with ThreadPoolExecutor(2) as threads:
            released = threads.submit(release_files, store, files, "b-1")
            threads.submit(requeue_with_files, store, files, "b-1").result()
            released.result()
        assert files.readers() == {"b-1"}
        with pytest.raises(FileInUseError):
            files.delete(file.id, "lab")


def test_a_job_without_its_files_is_not_submitted(store: JobStore, files: FileStore, file: FileRecord) -> None:
    files.delete(file.id, "lab")
    with pytest.raises(UnknownFileError):
        submit_with_files(store, files, SUBMISSION, [file], max_active=2)
    assert not store.known(["b-1"])


def test_a_job_whose_submission_was_not_answered_keeps_its_files(
    store: JobStore, files: FileStore, file: FileRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = JobStore.submit

    def unanswered(*arguments: object, **options: object) -> None:
        submit(*arguments, **options)  # type: ignore[arg-type]
        raise RegistryUnreachableError("The connection was lost.")

    with monkeypatch.context() as patched:
        patched.setattr(JobStore, "submit", unanswered)
        with pytest.raises(RegistryUnreachableError):
            submit_with_files(store, files, SUBMISSION, [file], max_active=2)
    with pytest.raises(FileInUseError):
        files.delete(file.id, "lab")
    # Sent again, it is the job of before.
    assert submit_with_files(store, files, SUBMISSION, [file], max_active=2).id == "b-1"


def test_a_tenants_jobs_that_are_submitted_at_once_stay_within_the_limit(store: JobStore, files: FileStore) -> None:
    inputs = [add(files, f"file-{number}") for number in range(9)]

    def submit(number: int) -> bool:
        each = replace(SUBMISSION, id=f"b-{number}", idempotency_key=str(number))
        try:
            return bool(submit_with_files(store, files, each, [inputs[number]], max_active=2))
        except JobError as error:
            assert "has 2 jobs of this kind that have not ended" in str(error)
            return False

    with ThreadPoolExecutor(6) as threads:
        accepted = list(threads.map(submit, range(6)))
    assert sum(accepted) == 2 and len(files.readers()) == 2
    first = accepted.index(True)
    assert submit(first), "sent again it is the job of before"
    store.cancel(f"b-{first}")
    assert submit(7) and not submit(8)


def test_a_submission_that_is_refused_leaves_nothing(store: JobStore) -> None:
    def refuse(session: Session) -> None:
        raise JobError("There are too many.")

    with pytest.raises(JobError, match="too many"):
        store.submit(SUBMISSION, also=refuse)
    assert not store.known(["b-1"])
    assert store.submit(SUBMISSION).is_new
