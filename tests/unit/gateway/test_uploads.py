"""OpenAI's uploads in parts at a gateway, through its SDK: parts in any order, completion, cancellation, expiry, refusals."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from files_world import Files, auth, files_world, until
from sqlalchemy import update

from tandem.db.schema import UploadRow

MIB = 2**20


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[Files]:
    async with files_world(tmp_path, max_part_bytes=MIB, max_upload_bytes=10 * MIB) as found:
        yield found


async def begin(files: Files, size: int, **options: Any) -> Any:
    arguments: dict[str, Any] = {"bytes": size, "filename": "a.bin", "mime_type": "text/plain", "purpose": "user_data"}
    return await files.lab.uploads.create(**(arguments | options))


async def test_parts_become_a_file_in_the_order_of_their_ids(files: Files) -> None:
    upload = await begin(files, 6, expires_after={"anchor": "created_at", "seconds": 3600})
    assert (upload.object, upload.status, upload.bytes, upload.filename) == ("upload", "pending", 6, "a.bin")
    assert upload.expires_at == upload.created_at + 3600 and upload.file is None
    second, first = [await files.lab.uploads.parts.create(upload.id, data=data) for data in (b"def", b"abc")]
    assert second.upload_id == upload.id and second.object == "upload.part"
    md5 = hashlib.md5(b"abcdef").hexdigest()
    done = await files.lab.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=md5)
    assert done.status == "completed" and done.file is not None and done.file.bytes == 6
    assert done.file.expires_at == done.file.created_at + 3600
    assert (await files.lab.files.content(done.file.id)).content == b"abcdef"
    again = await files.lab.uploads.complete(upload.id, part_ids=[first.id, second.id], md5=md5)
    assert again == done, "a completion that is sent again answers the same"
    await until(lambda: len(files.stored()) == 1)
    assert files.used_bytes() == 6


async def test_the_sdk_sends_a_large_file_in_parts(files: Files, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(range(256)) * (14 * MIB // 1024))
    upload = await files.lab.uploads.upload_file_chunked(
        file=path, mime_type="application/octet-stream", purpose="user_data", part_size=MIB
    )
    assert upload.status == "completed" and upload.file is not None
    assert (await files.lab.files.content(upload.file.id)).content == path.read_bytes()

    def in_memory() -> Any:
        with openai.OpenAI(base_url=files.lab.base_url, api_key=files.lab.api_key) as client:
            return client.uploads.upload_file_chunked(
                file=b"x" * 1000, filename="b.txt", bytes=1000, mime_type="text/plain", purpose="evals", part_size=300
            )

    assert (await asyncio.to_thread(in_memory)).file.bytes == 1000


async def test_a_cancelled_upload_takes_no_parts_and_leaves_nothing_behind(files: Files) -> None:
    upload = await begin(files, 6)
    part = await files.lab.uploads.parts.create(upload.id, data=b"abc")
    assert files.used_bytes() == 3
    for _ in range(2):
        assert (await files.lab.uploads.cancel(upload.id)).status == "cancelled"
    await until(lambda: files.stored() == [])
    assert files.used_bytes() == 0
    for call in (
        files.lab.uploads.parts.create(upload.id, data=b"def"),
        files.lab.uploads.complete(upload.id, part_ids=[part.id]),
    ):
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await call


async def test_an_upload_that_is_not_completed_in_an_hour_expires(files: Files) -> None:
    upload = await begin(files, 3)
    part = await files.lab.uploads.parts.create(upload.id, data=b"abc")
    with files.store._adding() as session:
        session.execute(update(UploadRow).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    with pytest.raises(openai.BadRequestError, match="expired"):
        await files.lab.uploads.complete(upload.id, part_ids=[part.id])
    files.world.app.state.files.upkeep.upload_ended()
    await until(lambda: files.stored() == [])
    assert files.used_bytes() == 0


async def test_what_does_not_make_the_announced_file_is_refused_before_it_is_made(files: Files) -> None:
    upload = await begin(files, 6)
    part = await files.lab.uploads.parts.create(upload.id, data=b"abc")
    other = await files.lab.uploads.parts.create((await begin(files, 3)).id, data=b"xyz")
    for part_ids, message in (
        ([part.id], "made for 6 bytes"),
        ([part.id, other.id], "is no part of"),
        ([part.id, part.id], "a part twice"),
        ([], "part_ids"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            await files.lab.uploads.complete(upload.id, part_ids=part_ids)
    with pytest.raises(openai.BadRequestError, match="made for 6 bytes"):
        await files.lab.uploads.parts.create(upload.id, data=b"defg")
    last = await files.lab.uploads.parts.create(upload.id, data=b"def")
    with pytest.raises(openai.BadRequestError, match="MD5"):
        await files.lab.uploads.complete(upload.id, part_ids=[part.id, last.id], md5="0" * 32)
    assert (await files.lab.uploads.complete(upload.id, part_ids=[part.id, last.id])).status == "completed"


async def test_sizes_and_fields_of_uploads_are_bounded(files: Files) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await begin(files, 10 * MIB + 1)
    assert caught.value.param == "bytes"
    for options, param in (
        ({"bytes": 0}, "bytes"),
        ({"purpose": "batch_output"}, "purpose"),
        ({"filename": "a\nb"}, "filename"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await begin(files, 5, **options)
        assert caught.value.param == param
    upload = await begin(files, 3 * MIB)
    with pytest.raises(openai.APIStatusError) as too_large:
        await files.lab.uploads.parts.create(upload.id, data=io.BytesIO(b"x" * (MIB + 1)))
    assert too_large.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="empty"):
        await files.lab.uploads.parts.create(upload.id, data=b"")
    assert files.stored() == []


async def test_an_upload_of_another_tenant_does_not_exist(files: Files) -> None:
    upload = await begin(files, 3)
    part = await files.lab.uploads.parts.create(upload.id, data=b"abc")
    for call in (
        files.other.uploads.parts.create(upload.id, data=b"abc"),
        files.other.uploads.complete(upload.id, part_ids=[part.id]),
        files.other.uploads.cancel(upload.id),
        files.lab.uploads.cancel("upload_none"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            await call
        assert "No such Upload object" in caught.value.message


async def test_completions_at_once_make_one_file(files: Files) -> None:
    upload = await begin(files, 2 * MIB)
    parts = [await files.lab.uploads.parts.create(upload.id, data=b"x" * MIB) for _ in range(2)]
    part_ids = [part.id for part in parts]
    done = await asyncio.gather(*(files.lab.uploads.complete(upload.id, part_ids=part_ids) for _ in range(3)))
    assert len({each.file.id for each in done if each.file}) == 1
    await until(lambda: len(files.stored()) == 1)
    assert files.used_bytes() == 2 * MIB


async def test_requests_sent_again_with_an_idempotency_key_make_one_upload_and_one_part(files: Files) -> None:
    headers = {"Idempotency-Key": "once"}
    uploads = [await begin(files, 6, extra_headers=headers) for _ in range(2)]
    assert uploads[0].id == uploads[1].id
    parts = [await files.lab.uploads.parts.create(uploads[0].id, data=b"abc", extra_headers=headers) for _ in range(2)]
    assert parts[0].id == parts[1].id and files.used_bytes() == 3 and len(files.stored()) == 1


async def test_a_part_whose_client_leaves_is_none(files: Files) -> None:
    upload = await begin(files, MIB)

    async def body() -> AsyncIterator[bytes]:
        yield b"--b\r\nContent-Disposition: form-data; name=data; filename=a\r\n\r\nabc"
        raise ConnectionAbortedError

    headers = auth(files.lab) | {"content-type": "multipart/form-data; boundary=b"}
    with pytest.raises(ConnectionAbortedError):
        await files.world.http.post(f"/v1/uploads/{upload.id}/parts", content=body(), headers=headers)
    await until(lambda: files.stored() == [])
    assert files.used_bytes() == 0
