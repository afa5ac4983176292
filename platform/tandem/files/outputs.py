"""Files that jobs write for clients: answers of a batch, results of a fine-tune. Blocking."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.files.content import ContentStore, remove_content
from tandem.files.records import FileRecord, NewFile, Purpose, new_file_id
from tandem.files.store import FileStore
from tandem.registry.conditions import ALWAYS, Condition


def write_output(
    store: FileStore,
    contents: ContentStore,
    chunks: Iterable[bytes],
    *,
    tenant: str,
    purpose: Purpose,
    filename: str,
    quota_bytes: int,
    lifetime_s: int | None = None,
    once: Condition = ALWAYS,
) -> FileRecord:
    """Store the bytes of `chunks` as a file of a tenant; nothing is left where that fails.

    `once`: written again under the same idempotency key within its retention, the file is the one of before.
    """
    file_id = new_file_id()
    with contents.writer(file_id) as writer:
        for chunk in chunks:
            writer.write(chunk)
        stored = writer.publish()
    new = NewFile(
        id=file_id,
        tenant=tenant,
        key_id="",
        purpose=purpose,
        filename=filename,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        location=stored.location,
        lifetime_s=lifetime_s,
    )
    record = None
    try:
        record = store.add(new, quota_bytes=quota_bytes, once=once)
        return record
    finally:
        if record is None or record.location != stored.location:
            remove_content(stored.location)
