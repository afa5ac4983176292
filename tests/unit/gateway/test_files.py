"""OpenAI's files at a gateway, through its SDK: upload, list, content, deletion, expiry, tenants, refusals. Real HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from files_world import (
    FORM_HEADERS,
    FORM_START,
    Files,
    accepted,
    auth,
    files_world,
    ids,
    multipart_headers,
    post_form,
    until,
    until_async,
)
from gateway_world import running
from sqlalchemy import update

from tandem.auth import KeyStore, Limits
from tandem.config import FilesConfig
from tandem.db.schema import FileRow
from tandem.errors import StorageError
from tandem.files.content import LocalWriter
from tandem.files.store import FileStore
from tandem.gateway.requests import held_bytes

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
REQUEST = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "base", "messages": []}}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[Files]:
    async with files_world(tmp_path) as found:
        yield found


async def test_a_file_is_uploaded_listed_read_and_deleted(files: Files) -> None:
    content = jsonl(REQUEST)
    made = await files.lab.files.create(file=("requests.jsonl", content), purpose="batch")
    assert made.id.startswith("file-") and made.object == "file" and made.status == "processed"
    assert (made.bytes, made.filename, made.purpose) == (len(content), "requests.jsonl", "batch")
    assert made.expires_at == made.created_at + 30 * 86_400, "files of batches expire after 30 days, as at OpenAI"
    assert await files.lab.files.retrieve(made.id) == made
    assert (await files.lab.files.content(made.id)).content == content
    assert await ids(files.lab.files.list()) == [made.id]
    gone = await files.lab.files.delete(made.id)
    assert gone.deleted and gone.id == made.id
    assert await ids(files.lab.files.list()) == [] and files.stored() == [] and files.used_bytes() == 0
    with pytest.raises(openai.NotFoundError) as caught:
        await files.lab.files.retrieve(made.id)
    assert caught.value.body["message"].startswith(f"No such File object: {made.id}")  # type: ignore[index]


async def test_the_synchronous_client_does_the_same(files: Files) -> None:
    def use() -> bytes:
        with openai.OpenAI(base_url=files.lab.base_url, api_key=files.lab.api_key) as client:
            made = client.files.create(file=b"some bytes", purpose="user_data")
            assert made.expires_at is None and [file.id for file in client.files.list()] == [made.id]
            content = client.files.content(made.id).content
            assert client.files.delete(made.id).deleted
            return content

    assert await asyncio.to_thread(use) == b"some bytes"


async def test_contents_are_private_and_recorded_with_their_digest(files: Files) -> None:
    made = await files.lab.files.create(file=("a.txt", b"secret"), purpose="user_data")
    record = files.store.get(made.id, "lab")
    assert record.sha256 == hashlib.sha256(b"secret").hexdigest()

    def modes() -> list[int]:
        path = Path(record.location)
        assert path.read_bytes() == b"secret"
        return [stat.S_IMODE(each.stat().st_mode) for each in (path, *list(path.parents)[:3])]

    assert await asyncio.to_thread(modes) == [0o600, 0o700, 0o700, 0o700]


async def test_lists_come_in_pages_in_both_orders_and_by_purpose(files: Files) -> None:
    made = [
        (await files.lab.files.create(file=(f"{n}.txt", b"x"), purpose="evals" if n % 2 else "vision")).id
        for n in range(5)
    ]
    page = await files.lab.files.list(limit=2)
    assert [file.id for file in page.data] == made[:2:-1] and page.has_more
    assert await ids(files.lab.files.list(limit=2)) == made[::-1]
    assert await ids(files.lab.files.list(limit=2, order="asc")) == made
    assert await ids(files.lab.files.list(purpose="evals", order="asc")) == made[1::2]
    assert [file.id for file in (await files.lab.files.list(after=made[2], order="asc")).data] == made[3:]
    await files.lab.files.delete(made[2])
    after_deleted = await files.lab.files.list(after=made[2], order="asc")
    assert [file.id for file in after_deleted.data] == made[3:], (
        "a page goes on after a file that was deleted meanwhile"
    )
    raw = (await files.world.http.get("/v1/files?limit=2", headers=auth(files.lab))).json()
    assert (raw["first_id"], raw["last_id"]) == (made[4], made[3])


async def test_a_file_of_another_tenant_does_not_exist(files: Files) -> None:
    made = await files.lab.files.create(file=b"mine", purpose="user_data")
    assert await ids(files.other.files.list()) == []
    for call in (files.other.files.retrieve, files.other.files.content, files.other.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call(made.id)
    with pytest.raises(openai.NotFoundError):
        await files.other.files.list(after=made.id)
    assert await ids(files.user.files.list()) == [made.id], "keys of one tenant share its files"


async def test_files_for_training_need_the_role_trainer(files: Files) -> None:
    with pytest.raises(openai.PermissionDeniedError) as caught:
        await files.user.files.create(file=("a.jsonl", jsonl(CHAT)), purpose="fine-tune")
    assert caught.value.code == "insufficient_permissions" and files.stored() == []
    made = await files.lab.files.create(file=("a.jsonl", jsonl(CHAT)), purpose="fine-tune")
    with pytest.raises(openai.PermissionDeniedError):
        await files.user.files.delete(made.id)


async def test_files_for_training_are_checked_after_the_upload(files: Files) -> None:
    good = await files.lab.files.create(file=("good.jsonl", jsonl(CHAT, CHAT)), purpose="fine-tune")
    bad = await files.lab.files.create(file=("bad.jsonl", jsonl(CHAT) + b'{"messages": 1}\n'), purpose="fine-tune")
    assert (good.status, bad.status) == ("uploaded", "uploaded")
    good = await files.lab.files.wait_for_processing(good.id, poll_interval=0.05, max_wait_seconds=60)
    bad = await files.lab.files.wait_for_processing(bad.id, poll_interval=0.05, max_wait_seconds=60)
    assert good.status == "processed" and good.status_details is None
    assert bad.status == "error" and "Line 2" in (bad.status_details or "")


async def test_a_file_that_a_job_reads_is_not_deleted(files: Files) -> None:
    made = await files.lab.files.create(file=b"rows", purpose="user_data")
    for _ in range(2):
        files.store.hold(made.id, "lab", "job-1")
    with pytest.raises(openai.ConflictError) as caught:
        await files.lab.files.delete(made.id)
    assert caught.value.code == "file_in_use" and "job-1" in caught.value.message
    assert caught.value.response.headers["x-should-retry"] == "false"
    for _ in range(2):
        files.store.release("job-1")
    assert (await files.lab.files.delete(made.id)).deleted


async def test_an_expired_file_is_gone_for_clients_at_once_and_from_the_disk_soon(files: Files) -> None:
    made = await files.lab.files.create(
        file=b"short-lived", purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert made.expires_at == made.created_at + 3600
    with files.store._adding() as session:
        session.execute(update(FileRow).values(expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    with pytest.raises(openai.NotFoundError):
        await files.lab.files.retrieve(made.id)
    assert await ids(files.lab.files.list()) == []
    service = files.world.app.state.files
    service.upkeep.upload_ended()
    await until(lambda: files.stored() == [])
    assert files.used_bytes() == 0


WRONG_FIELDS: tuple[tuple[dict[str, str], str], ...] = (
    ({"purpose": "finetune"}, "purpose"),
    ({"purpose": "batch_output"}, "purpose"),
    ({}, "purpose"),
    (
        {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
        "expires_after.seconds",
    ),
    ({"purpose": "batch", "expires_after[anchor]": "now", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
    ({"purpose": "batch", "expires_after": "1h"}, "expires_after"),
    ({"purpose": "batch", "expires_after": "1h", "expires_after[seconds]": "3600"}, "expires_after"),
    ({"purpose": "batch", "color": "red"}, "color"),
    ({"purpose": "x" * 5000}, "purpose"),
)


async def test_wrong_fields_are_refused_with_their_name_before_and_after_the_file(files: Files) -> None:
    for values, param in WRONG_FIELDS:
        for file_first in (False, True):
            parts: list[tuple[str, Any]] = [(name, (None, value)) for name, value in values.items()]
            parts.insert(0 if file_first else len(parts), ("file", ("a.txt", b"x" * 100_000)))
            answer = await post_form(files, parts)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["param"].startswith(param) and error["type"] == "invalid_request_error", error
    assert files.stored() == []


async def test_forms_that_are_none_are_refused(files: Files) -> None:
    purpose = ("purpose", (None, "batch"))
    for parts, message in (
        ([purpose], "`file` is missing"),
        ([purpose, ("file", ("a", b""))], "The file is empty"),
        ([purpose, ("file", ("a", b"x")), ("file", ("b", b"y"))], "`file` twice"),
        ([purpose, ("file", ("a" * 300, b"x"))], "300 characters"),
    ):
        answer = await post_form(files, parts)
        assert answer.status_code == 400 and message in answer.text
    headers = auth(files.lab)
    for content_type, body, status in (
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 415),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nrest", 400),
        ("multipart/form-data; boundary=b", b"no boundary here", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nX: " + b"y" * 10_000, 400),
        ("multipart/form-data; boundary=" + "b" * 300, b"", 400),
    ):
        answer = await files.world.http.post(
            "/v1/files", content=body, headers={**headers, "content-type": content_type}
        )
        assert answer.status_code == status, (content_type, body[:40], answer.text)
    assert files.stored() == []


async def test_a_file_that_is_too_large_is_refused_whether_or_not_its_size_is_announced(tmp_path: Path) -> None:
    async with files_world(tmp_path, max_file_bytes=300_000) as files:
        exact = await files.lab.files.create(file=b"x" * 300_000, purpose="user_data")
        assert exact.bytes == 300_000
        for size in (300_001, 5_000_000):
            with pytest.raises(openai.APIStatusError) as caught:
                await files.lab.files.create(file=b"x" * size, purpose="user_data")
            assert caught.value.status_code == 413 and "300,000" in caught.value.message

        async def body() -> AsyncIterator[bytes]:
            yield FORM_START
            for _ in range(100):
                yield b"x" * 10_000

        answer = await files.world.http.post("/v1/files", content=body(), headers=FORM_HEADERS | auth(files.lab))
        assert answer.status_code == 413
        assert len(files.stored()) == 1


async def test_a_tenant_has_no_more_bytes_than_its_quota(tmp_path: Path) -> None:
    async with files_world(tmp_path, tenant_bytes=100_000) as files:
        first = await files.lab.files.create(file=b"x" * 60_000, purpose="user_data")
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await files.lab.files.create(file=b"x" * 40_001, purpose="user_data")
        assert caught.value.code == "file_quota_exceeded" and "60,000" in caught.value.message
        assert (await files.other.files.create(file=b"x" * 100_000, purpose="user_data")).bytes == 100_000
        await files.lab.files.delete(first.id)
        made = await asyncio.gather(
            *(files.lab.files.create(file=b"x" * 30_000, purpose="user_data") for _ in range(6)), return_exceptions=True
        )
        assert sum(not isinstance(each, Exception) for each in made) == 3, "uploads at once do not share the last bytes"
        assert files.used_bytes() == 90_000 and len(files.stored()) == 4


async def test_uploads_that_are_under_way_count_for_the_quota_of_their_tenant(tmp_path: Path) -> None:
    sent, go_on = asyncio.Event(), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:  # without a Content-Length
        yield FORM_START + b"x" * 3_000_000
        await until(lambda: any(path.stat().st_size > 1_000_000 for path in files.stored()))
        sent.set()
        await go_on.wait()
        yield b"\r\n--b--\r\n"

    async with files_world(tmp_path, tenant_bytes=4_000_000) as files:
        first = asyncio.create_task(
            files.world.http.post("/v1/files", content=body(), headers=FORM_HEADERS | auth(files.lab))
        )
        await sent.wait()
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await files.lab.files.create(file=b"x" * 3_500_000, purpose="user_data")
        assert caught.value.code == "file_quota_exceeded"
        assert (await files.other.files.create(file=b"x" * 3_500_000, purpose="user_data")).bytes == 3_500_000
        go_on.set()
        assert (await first).status_code == 200
        await files.lab.files.delete((await first).json()["id"])
        assert (await files.lab.files.create(file=b"x" * 3_500_000, purpose="user_data")).bytes == 3_500_000


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(files: Files) -> None:
    left = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield FORM_START + b"x" * 3_000_000
        await until(lambda: any(path.stat().st_size > 1_000_000 for path in files.stored()))
        left.set()
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        await files.world.http.post("/v1/files", content=body(), headers=FORM_HEADERS | auth(files.lab))
    assert left.is_set()
    await until(lambda: files.stored() == [])
    assert await ids(files.lab.files.list()) == [] and files.world.app.state.relay.held_bytes.held == 0


async def test_a_client_that_goes_silent_gets_408_and_leaves_nothing_behind(files: Files) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield FORM_START + b"x" * 10
        await asyncio.sleep(30)

    # The world's gateway waits two seconds for a byte.
    answer = await files.world.http.post("/v1/files", content=body(), headers=FORM_HEADERS | auth(files.lab))
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "upload_timeout"
    assert files.stored() == []


async def test_uploads_that_stall_make_room_for_others_in_the_byte_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Well below the two seconds after which the world's gateway ends an upload by itself.
    monkeypatch.setattr(held_bytes, "STALLED_S", 0.1)
    async with files_world(tmp_path) as files:
        budget = files.world.app.state.relay.held_bytes
        budget.limit = 700_000  # one tenant may have half of it
        ended = asyncio.Event()

        async def stalling() -> AsyncIterator[bytes]:
            yield FORM_START + b"x" * 300_000
            await ended.wait()

        stalled = asyncio.create_task(
            files.world.http.post("/v1/files", content=stalling(), headers=FORM_HEADERS | auth(files.lab))
        )
        await until(lambda: budget.held > 300_000)
        await asyncio.sleep(0.2)
        made = await files.lab.files.create(file=b"y" * 300_000, purpose="user_data")
        ended.set()  # the client reads no answer before its body has ended
        answer = await stalled
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "gateway_full"
        assert [path.name for path in files.stored()] == [made.id] and budget.held == 0


async def test_a_full_disk_is_answered_with_503_and_leaves_nothing_behind(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2_000_000
    written = LocalWriter.write

    def full(writer: LocalWriter, chunk: bytes) -> None:
        if writer.size_bytes + len(chunk) > limit:
            raise StorageError("The disk is full.")
        written(writer, chunk)

    monkeypatch.setattr(LocalWriter, "write", full)
    with pytest.raises(openai.InternalServerError) as caught:
        await files.lab.files.create(file=b"x" * 5_000_000, purpose="user_data")
    assert caught.value.status_code == 503 and caught.value.code == "storage_unavailable"
    assert files.stored() == [] and files.used_bytes() == 0


async def test_the_same_request_sent_again_with_its_idempotency_key_makes_one_file(files: Files) -> None:
    headers = {"Idempotency-Key": "once"}
    made = await asyncio.gather(
        *(files.lab.files.create(file=b"same", purpose="user_data", extra_headers=headers) for _ in range(3))
    )
    assert len({file.id for file in made}) == 1 and len(files.stored()) == 1 and files.used_bytes() == 4
    with pytest.raises(openai.BadRequestError) as caught:
        await files.lab.files.create(file=b"another", purpose="user_data", extra_headers=headers)
    assert caught.value.param == "Idempotency-Key"
    again = await files.user.files.create(file=b"same", purpose="user_data", extra_headers=headers)
    assert again.id != made[0].id, "a key counts for its own caller"


async def test_uploads_count_as_requests_and_are_in_usage_and_the_access_log(files: Files, tmp_path: Path) -> None:
    keys = KeyStore.at(files.world.registry.address)
    secret = keys.create("few", tenant="few", limits=Limits(requests_per_minute=2), by="test").secret
    client = files.lab.with_options(api_key=secret)
    await until_async(lambda: accepted(client))
    for _ in range(2):
        await client.files.create(file=b"x", purpose="user_data")
    with pytest.raises(openai.RateLimitError):
        await client.files.create(file=b"x", purpose="user_data")
    assert len(await ids(client.files.list())) == 2, "lists do not count"
    usage = files.world.app.state.files
    await usage._accounting.usage.flush()
    from tandem.usage import UsageStore

    [row] = UsageStore.at(files.world.registry.address).sums(["tenant", "route"], tenant="few")
    assert (row["route"], row["requests"], row["prompt_tokens"]) == ("/v1/files", 2, 0)

    def line() -> Any:
        text = (tmp_path / "logs" / "access.jsonl").read_text() if (tmp_path / "logs").exists() else ""
        return [json.loads(each) for each in text.splitlines() if '"POST"' in each and '"few"' in each]

    await until(lambda: len(line()) == 3)
    assert [each["path"] for each in line()] == ["/v1/files"] * 3


async def test_a_web_page_cannot_upload_to_an_app_without_keys(tmp_path: Path) -> None:
    config = FilesConfig(location=str(tmp_path / "files"))
    async with running(tmp_path, files=config, cors_origins=("https://chat.example.com",)) as world:
        form = [("purpose", (None, "user_data")), ("file", ("a", b"x"))]
        for origin, status in (("https://evil.example.com", 403), ("null", 403), ("https://chat.example.com", 200)):
            headers = multipart_headers(world, {"origin": origin})
            answer = await world.http.post("/v1/files", files=form, headers=headers)
            assert answer.status_code == status, answer.text
        # Files of an app without keys belong to the tenant of keys that are made without one.
        assert len(FileStore.at(world.registry.address).page("default", limit=10)) == 1


async def test_the_content_of_a_client_that_leaves_is_closed(files: Files) -> None:
    made = await files.lab.files.create(file=b"x" * 20_000_000, purpose="user_data")
    location = files.store.get(made.id, "lab").location

    def is_open() -> bool:
        return any(os.path.realpath(f"/proc/self/fd/{each}") == location for each in os.listdir("/proc/self/fd"))

    head = await files.world.http.head(f"/v1/files/{made.id}/content", headers=auth(files.lab))
    assert head.headers["content-length"] == "20000000" and "attachment" in head.headers["content-disposition"]
    async with files.world.http.stream("GET", f"/v1/files/{made.id}/content", headers=auth(files.lab)) as answer:
        assert len(await anext(answer.aiter_bytes())) > 0
        assert is_open()
    await until(lambda: not is_open())
    assert len((await files.lab.files.content(made.id)).content) == 20_000_000
