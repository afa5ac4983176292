"""Records of files and uploads in OpenAI's shape. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from starlette.responses import Response

from tandem.api.openai.files import FileObject, Upload, UploadPart
from tandem.files.records import FileRecord, PartRecord, UploadRecord


def to_file(record: FileRecord) -> FileObject:
    """One file."""
    return FileObject(
        id=record.id,
        bytes=record.size_bytes,
        created_at=_seconds(record.created_at),
        expires_at=None if record.expires_at is None else _seconds(record.expires_at),
        filename=record.filename,
        purpose=record.purpose.value,
        status=record.status.value,
        status_details=record.status_details,
    )


def to_upload(record: UploadRecord, file: FileRecord | None = None) -> Upload:
    """An upload, with the file that it has become."""
    return Upload(
        id=record.id,
        bytes=record.size_bytes,
        created_at=_seconds(record.created_at),
        expires_at=_seconds(record.expires_at),
        filename=record.filename,
        purpose=record.purpose.value,
        status=record.status.value,
        file=None if file is None else to_file(file),
    )


def to_part(record: PartRecord) -> UploadPart:
    """A part of an upload."""
    return UploadPart(id=record.id, created_at=_seconds(record.created_at), upload_id=record.upload_id)


def page_json(records: Sequence[FileRecord], has_more: bool) -> bytes:
    """One page of files as JSON. It is made row by row: one call for thousands of rows would stop the event loop's thread."""
    ids = [f'"{record.id}"' for record in (records[:1] + records[-1:] if records else ())]  # type: ignore[operator]
    first, last = ids or ("null", "null")
    rows = ",".join(to_file(record).model_dump_json() for record in records)
    text = f'{{"object":"list","data":[{rows}],"first_id":{first},"last_id":{last},"has_more":{str(has_more).lower()}}}'
    return text.encode()


def json_response(model: FileObject | Upload | UploadPart, status: int = 200) -> Response:
    """A response with one object."""
    return Response(model.model_dump_json(), status_code=status, media_type="application/json")


def _seconds(time: datetime) -> int:
    return int(time.timestamp())
