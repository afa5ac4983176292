"""Files and uploads in the database: quota, holds by jobs, idempotency, checks and expiry, also by several at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from tandem.db.schema import FileRow
from tandem.errors import FileError, FileInUseError, FileQuotaError, UnknownFileError
from tandem.files.records import FileRecord, FileStatus, NewFile, PartRecord, Purpose, new_file_id, new_part_id
from tandem.files.uploads import UploadStore
from tandem.registry.conditions import Condition

QUOTA = 1000


def new(size: int = 10, **fields: Any) -> NewFile:
    file_id = new_file_id()
    values: dict[str, Any] = {
        "id": file_id, "tenant": "lab", "key_id": "key", "purpose": Purpose.USER_DATA, "filename": "a",
        "size_bytes": size, "sha256": "0" * 64, "location": f"/nowhere/{file_id}",
    }  # fmt: skip
    return NewFile(**(values | fields))


def add(store: UploadStore, size: int = 10, **fields: Any) -> FileRecord:
    return store.add(new(size, **fields), quota_bytes=QUOTA)


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """The results of `work` in threads, or their FileErrors."""

    def attempt(_: int) -> Any:
        try:
            return work()
        except FileError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(attempt, range(count)))


def test_files_added_at_once_stay_within_the_quota_and_deleted_ones_make_room(store: UploadStore) -> None:
    results = at_once(8, lambda: add(store, 300))
    made = [each for each in results if isinstance(each, FileRecord)]
    assert len(made) == 3 and all(isinstance(each, FileQuotaError) for each in results if each not in made)
    assert store.used_bytes("lab") == 900 and store.used_bytes("other") == 0
    assert sum(isinstance(each, FileRecord) for each in at_once(4, lambda: store.delete(made[0].id, "lab"))) == 1
    assert store.used_bytes("lab") == 600


def test_a_file_is_either_held_by_a_job_or_deleted(store: UploadStore) -> None:
    for number in range(6):
        file = add(store)
        with ThreadPoolExecutor(2) as threads:
            held = threads.submit(store.hold, file.id, "lab", f"job{number}")
            deleted = threads.submit(store.delete, file.id, "lab")
        errors = [future.exception() for future in (held, deleted)]
        assert sum(error is None for error in errors) == 1, errors
        if errors[0] is None:
            assert isinstance(errors[1], FileInUseError)
            store.release(f"job{number}")
            store.delete(file.id, "lab")
        else:
            assert isinstance(errors[0], UnknownFileError)


def test_a_file_is_free_when_the_last_of_its_jobs_has_ended(store: UploadStore) -> None:
    file = add(store)
    for job in ("one", "one", "two"):
        assert store.hold(file.id, "lab", job).id == file.id
    store.release("one")
    store.release("one")
    with pytest.raises(FileInUseError, match="two"):
        store.delete(file.id, "lab")
    store.release("two")
    store.delete(file.id, "lab")
    with pytest.raises(UnknownFileError):
        store.hold(file.id, "lab", "three")
    with pytest.raises(UnknownFileError):
        store.hold(add(store).id, "other", "three")


def test_an_expired_file_stays_while_a_job_reads_it(store: UploadStore) -> None:
    held, free = add(store, lifetime_s=3600), add(store, lifetime_s=3600)
    store.hold(held.id, "lab", "job")
    with store._adding() as session:
        session.execute(update(FileRow).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    assert store.get(held.id, "lab").id == held.id
    with pytest.raises(UnknownFileError):
        store.get(free.id, "lab")
    assert store.expire() == 1 and store.deleted_contents() == [(free.id, free.location)]
    store.release("job")
    assert store.expire() == 1 and store.used_bytes("lab") == 0
    for file_id, _ in store.deleted_contents():
        store.content_removed(file_id)
    assert store.deleted_contents() == []


def test_expired_files_that_jobs_read_keep_no_others(store: UploadStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.files.store.MOST_EXPIRED", 2)
    files = [add(store, lifetime_s=3600) for _ in range(5)]
    for file in files[:4]:
        store.hold(file.id, "lab", "paused")
    with store._adding() as session:
        session.execute(update(FileRow).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
        # Held ones come first by time.
        free = update(FileRow).where(FileRow.id == files[4].id)
        session.execute(free.values(expires_at=datetime.now(UTC) - timedelta(milliseconds=1)))
    assert store.expire() == 1
    assert [file_id for file_id, _ in store.deleted_contents()] == [files[4].id]


def test_requests_at_once_with_one_idempotency_key_make_one_file(store: UploadStore) -> None:
    once = Condition(once="k" * 64)
    made = at_once(4, lambda: store.add(new(), quota_bytes=QUOTA, once=once))
    assert len({record.id for record in made}) == 1 and store.used_bytes("lab") == 10
    with pytest.raises(FileError, match="Idempotency-Key"):
        store.add(new(sha256="1" * 64), quota_bytes=QUOTA, once=once)


def test_a_file_for_training_is_checked_by_one_at_a_time(store: UploadStore) -> None:
    file = add(store, purpose=Purpose.FINE_TUNE)
    add(store, purpose=Purpose.BATCH)
    claimed = at_once(4, lambda: store.claim_unchecked(60))
    assert [each.id for each in claimed if each is not None] == [file.id]
    with store._adding() as session:
        session.execute(update(FileRow).values(check_until=datetime.now(UTC) - timedelta(seconds=1)))
    again = store.claim_unchecked(60)
    assert again is not None and again.id == file.id, "after the lease another one checks it"
    store.set_checked(file.id, FileStatus.ERROR, "x" * 5000)
    checked = store.get(file.id, "lab")
    assert checked.status is FileStatus.ERROR and len(checked.status_details or "") == 1024
    assert store.claim_unchecked(60) is None


def test_lists_order_files_of_one_moment_by_their_ids(store: UploadStore) -> None:
    made = [add(store, 1) for _ in range(7)]
    with store._adding() as session:
        session.execute(update(FileRow).values(created_at=datetime(2026, 1, 1, tzinfo=UTC)))
    found: list[str] = []
    while page := store.page("lab", after=found[-1] if found else None, limit=3, newest_first=False):
        found += [record.id for record in page]
    assert found == sorted(record.id for record in made)


def test_parts_of_an_upload_count_until_it_ends(store: UploadStore) -> None:
    upload = store.create_upload(tenant="lab", key_id="key", purpose=Purpose.USER_DATA, filename="a", size_bytes=QUOTA)

    def part() -> PartRecord:
        record = PartRecord(
            id=new_part_id(), upload_id=upload.id, size_bytes=400, location="/nowhere", created_at=datetime.now(UTC)
        )
        return store.add_part(record, "lab", quota_bytes=QUOTA)

    parts = [each for each in at_once(5, part) if isinstance(each, PartRecord)]
    assert len(parts) == 2 and store.used_bytes("lab") == 800
    file = new(QUOTA)
    done = at_once(3, lambda: store.complete(upload.id, [each.id for each in parts], file, quota_bytes=QUOTA))
    assert sum(isinstance(each, tuple) for each in done) == 1
    assert store.used_bytes("lab") == QUOTA, "the parts have made room for the file"
    assert {each.id for each in store.ended_parts()} == {each.id for each in parts}
    for each in parts:
        store.forget_part(each.id)
    assert store.ended_parts() == []
