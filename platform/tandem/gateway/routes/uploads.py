"""Routes of OpenAI's uploads in parts: create, add a part, complete, cancel."""

from __future__ import annotations

import functools
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from tandem.api.openai.files import UploadCompletion, UploadCreation
from tandem.errors import FileError
from tandem.files.content import StoredContent, join_contents
from tandem.files.records import (
    FileRecord,
    NewFile,
    PartRecord,
    Purpose,
    UploadRecord,
    UploadStatus,
    new_file_id,
    new_part_id,
)
from tandem.files.uploads import check_capacity
from tandem.gateway.errors import ApiError
from tandem.gateway.files.answers import json_response, to_part, to_upload
from tandem.gateway.files.intake import ClientLeftError, announced_bytes, discard_body, in_thread, receive_form
from tandem.gateway.files.service import FileService, check_purpose
from tandem.gateway.identity.authentication import tenant_of
from tandem.gateway.requests.multipart import FRAME_BYTES
from tandem.gateway.requests.request_body import parse_body, read_body
from tandem.gateway.routes.conditions import condition_of
from tandem.gateway.routes.files import NoResponse, checked_filename, record_content
from tandem.gateway.routes.management import M, validated

PATH = "/v1/uploads"
MAX_BODY_BYTES = 512 * 1024
"""JSON with the ids of 10,000 parts."""


class UploadRoutes:
    """The route handlers."""

    def __init__(self, service: FileService) -> None:
        self._service = service

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        upload = f"{PATH}/{{upload_id}}"
        return [
            Route(PATH, self.create, methods=["POST"]),
            Route(f"{upload}/parts", self.add_part, methods=["POST"]),
            Route(f"{upload}/complete", self.complete, methods=["POST"]),
            Route(f"{upload}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        """Begin an upload; it expires after an hour."""
        service, limits = self._service, self._service.config.files
        async with service.counted(request, PATH) as principal:
            body = await self._read(request, UploadCreation)
            if body.bytes > limits.max_upload_bytes:
                raise ApiError(
                    400,
                    f"`bytes` is {body.bytes:,}; at most {limits.max_upload_bytes:,} are taken (gateway.files.max_upload_bytes).",
                    param="bytes",
                )
            check_purpose(principal, Purpose(body.purpose))
            tenant = tenant_of(principal)
            await service.ask(service.store.check_quota, tenant, body.bytes, limits.tenant_bytes)
            record = await service.ask(
                service.store.create_upload,
                tenant=tenant,
                key_id=principal.key_id,
                purpose=Purpose(body.purpose),
                filename=checked_filename(body.filename, "filename"),
                size_bytes=body.bytes,
                file_lifetime_s=None if body.expires_after is None else body.expires_after.seconds,
                once=condition_of(request),
            )
            return json_response(to_upload(record))

    async def add_part(self, request: Request) -> Response:
        """Add a part: a form with `data`."""
        service, limits = self._service, self._service.config.files
        async with service.counted(request, f"{PATH}/{{upload_id}}/parts") as principal:
            once, tenant = condition_of(request), tenant_of(principal)
            expected_bytes = max(0, announced_bytes(request) - FRAME_BYTES)
            part_id = new_part_id()
            try:
                upload = await self._pending(request, tenant, "add a part")
                with service.api_errors():
                    check_capacity(upload, expected_bytes, 0, 0)
                used_bytes = await service.ask(service.store.check_quota, tenant, expected_bytes, limits.tenant_bytes)
                writer = await service.store_content(service.contents.writer, part_id, expected_bytes)
            except ApiError:
                await discard_body(request, limits.max_part_bytes)
                raise
            try:
                with (
                    service.api_errors(),
                    service.in_transit.upload(tenant, used_bytes, limits.tenant_bytes) as counted,
                ):
                    form = await receive_form(
                        request,
                        writer,
                        counted,
                        file_field="data",
                        max_bytes=limits.max_part_bytes,
                        config=service.config,
                        held_body=service.held_bytes.body(principal.tenant),
                        threads=service.storage_threads,
                    )
                if not form.file_bytes:
                    raise ApiError(400, "The part is empty.", param="data")
                stored = await service.store_content(writer.publish)
            except ClientLeftError:
                return NoResponse()
            finally:
                await service.store_content(writer.discard)
            part = PartRecord(
                id=part_id,
                upload_id=upload.id,
                size_bytes=stored.size_bytes,
                location=stored.location,
                created_at=datetime.now(UTC),
            )
            record = await record_content(
                service, part.location, service.store.add_part, part, tenant, quota_bytes=limits.tenant_bytes, once=once
            )
            return json_response(to_part(record))

    async def complete(self, request: Request) -> Response:
        """Make a file of the parts, in the order of `part_ids`. Sent again with the same parts, it answers the same."""
        service = self._service
        async with service.counted(request, f"{PATH}/{{upload_id}}/complete") as principal:
            body = await self._read(request, UploadCompletion)
            tenant = tenant_of(principal)
            upload = await service.ask(service.store.upload, request.path_params["upload_id"], tenant)
            if (file := await self._completed_before(upload, body)) is not None:
                return json_response(to_upload(upload, file))
            upload = await self._pending(request, tenant, "complete it")
            parts = await service.ask(service.store.parts, upload.id, body.part_ids)
            if (sent_bytes := sum(part.size_bytes for part in parts)) != upload.size_bytes:
                raise ApiError(
                    400,
                    f"The upload was made for {upload.size_bytes:,} bytes, and its {len(parts)} parts have {sent_bytes:,}. Send "
                    "what is missing, or cancel it.",
                    param="part_ids",
                )
            file_id = new_file_id()
            stored = await self._join(file_id, parts, upload.size_bytes, body.md5)
            new = NewFile(
                id=file_id,
                tenant=tenant,
                key_id=principal.key_id,
                purpose=upload.purpose,
                filename=upload.filename,
                size_bytes=stored.size_bytes,
                sha256=stored.sha256,
                location=stored.location,
                lifetime_s=upload.file_lifetime_s,
            )
            finish = functools.partial(self._finish, upload, body, new)
            record = await record_content(service, new.location, finish)
            service.upkeep.upload_ended()
            service.upkeep.file_added()
            return json_response(to_upload(await service.ask(service.store.upload, upload.id, tenant), record))

    async def cancel(self, request: Request) -> Response:
        """End an upload; its parts are removed."""
        service = self._service
        async with service.counted(request, f"{PATH}/{{upload_id}}/cancel") as principal:
            record = await service.ask(service.store.cancel, request.path_params["upload_id"], tenant_of(principal))
            service.upkeep.upload_ended()
            return json_response(to_upload(record))

    async def _read(self, request: Request, model: type[M]) -> M:
        raw = await read_body(request, MAX_BODY_BYTES, self._service.config.upload_timeout_s)
        values = {key: value for key, value in parse_body(raw).items() if value is not None}
        return validated(model, values)

    async def _pending(self, request: Request, tenant: str, action: str) -> UploadRecord:
        store = self._service.store
        return await self._service.ask(store.pending_upload, request.path_params["upload_id"], tenant, action)

    async def _completed_before(self, upload: UploadRecord, body: UploadCompletion) -> FileRecord | None:
        """The file of an upload that was completed with the same parts."""
        if upload.status is not UploadStatus.COMPLETED or list(upload.part_ids or ()) != body.part_ids:
            return None
        return await self._service.ask(self._service.store.get, upload.file_id or "", upload.tenant)

    async def _join(self, file_id: str, parts: list[PartRecord], size_bytes: int, md5: str | None) -> StoredContent:
        """The stored content of all parts; ApiError 400 if it has another MD5 than expected."""
        service = self._service
        writer = await service.store_content(service.contents.writer, file_id, size_bytes)
        try:
            with service.api_errors():
                locations = [part.location for part in parts]
                stored = await in_thread(service.join_threads, join_contents, locations, writer)
        finally:
            await service.store_content(writer.discard)
        if md5 is not None and md5.lower() != stored.md5:
            await service.remove_content(stored.location)
            raise ApiError(400, f"The parts have the MD5 {stored.md5}, and `md5` is another one.", param="md5")
        return stored

    def _finish(self, upload: UploadRecord, body: UploadCompletion, new: NewFile) -> FileRecord:
        """Record the file; the one of before if the same request was faster."""
        store = self._service.store
        try:
            quota_bytes = self._service.config.files.tenant_bytes
            return store.complete(upload.id, body.part_ids, new, quota_bytes=quota_bytes)[1]
        except FileError:
            ended = store.upload(upload.id, upload.tenant)
            if ended.status is UploadStatus.COMPLETED and list(ended.part_ids or ()) == body.part_ids:
                return store.get(ended.file_id or "", upload.tenant)
            raise
