"""Routes of OpenAI's files: upload, list, show, content, delete."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tandem.api.openai.files import DeletedFile, FileForm
from tandem.auth.principal import Principal
from tandem.errors import did_you_mean
from tandem.files.records import LONGEST_FILENAME, FileRecord, NewFile, PartRecord, Purpose, new_file_id
from tandem.gateway.errors import ApiError
from tandem.gateway.files.answers import json_response, page_json, to_file
from tandem.gateway.files.download import content_response
from tandem.gateway.files.intake import ClientLeftError, announced_bytes, discard_body, receive_form
from tandem.gateway.files.service import FileService, check_purpose
from tandem.gateway.identity.authentication import principal_of, tenant_of
from tandem.gateway.requests.multipart import FRAME_BYTES, Form
from tandem.gateway.requests.query import order_of, page_limit
from tandem.gateway.routes.conditions import condition_of
from tandem.gateway.routes.management import validated

R = TypeVar("R", FileRecord, PartRecord)

PATH = "/v1/files"
MOST_LISTED = 10_000
"""Files of one page, and of a request that names no limit, as at OpenAI."""
UNNAMED = "upload"
"""Name of a file that came without one."""


class FileRoutes:
    """The route handlers."""

    def __init__(self, service: FileService) -> None:
        self._service = service

    def routes(self) -> list[BaseRoute]:
        """The routes for Starlette."""
        return [
            Route(PATH, self.list_files),
            Route(PATH, self.create, methods=["POST"]),
            Route(f"{PATH}/{{file_id}}", self.show),
            Route(f"{PATH}/{{file_id}}", self.delete, methods=["DELETE"]),
            Route(f"{PATH}/{{file_id}}/content", self.content),
        ]

    async def create(self, request: Request) -> Response:
        """Upload a file: a form with `file`, `purpose` and, if it is to expire, `expires_after`."""
        service = self._service
        async with service.counted(request, PATH) as principal:
            once, max_bytes = condition_of(request), service.config.files.max_file_bytes
            expected_bytes = max(0, announced_bytes(request) - FRAME_BYTES)
            file_id, tenant = new_file_id(), tenant_of(principal)
            try:
                used_bytes = await service.ask(
                    service.store.check_quota, tenant, expected_bytes, service.config.files.tenant_bytes
                )
                writer = await service.store_content(service.contents.writer, file_id, min(expected_bytes, max_bytes))
            except ApiError:
                await discard_body(request, max_bytes)
                raise
            try:
                with (
                    service.api_errors(),
                    service.in_transit.upload(tenant, used_bytes, service.config.files.tenant_bytes) as counted,
                ):
                    form = await receive_form(
                        request,
                        writer,
                        counted,
                        file_field="file",
                        max_bytes=max_bytes,
                        config=service.config,
                        held_body=service.held_bytes.body(principal.tenant),
                        threads=service.storage_threads,
                        check_field=lambda name, value: _check_field(principal, name, value),
                    )
                options = read_form(form)
                check_purpose(principal, Purpose(options.purpose))
                filename = checked_filename(form.filename or UNNAMED, "file")
                stored = await service.store_content(writer.publish)
            except ClientLeftError:
                return NoResponse()
            finally:
                await service.store_content(writer.discard)
            new = NewFile(
                id=file_id,
                tenant=tenant,
                key_id=principal.key_id,
                purpose=Purpose(options.purpose),
                filename=filename,
                size_bytes=stored.size_bytes,
                sha256=stored.sha256,
                location=stored.location,
                lifetime_s=None if options.expires_after is None else options.expires_after.seconds,
            )
            record = await record_content(
                service,
                stored.location,
                service.store.add,
                new,
                quota_bytes=service.config.files.tenant_bytes,
                once=once,
            )
            service.upkeep.file_added()
            return json_response(to_file(record))

    async def list_files(self, request: Request) -> Response:
        """The files of the caller's tenant, newest first (`order=asc`: oldest), at most `limit` after the id `after`."""
        query = request.query_params
        limit = page_limit(request, MOST_LISTED, MOST_LISTED)
        order, purpose = order_of(request, "desc"), query.get("purpose")
        if purpose is not None and purpose not in list(Purpose):
            hint = did_you_mean(purpose, list(Purpose))
            raise ApiError(400, f"There is no purpose {purpose[:40]!r}.{hint}", param="purpose")
        body = await self._service.ask(
            self._page, tenant_of(principal_of(request.scope)), query.get("after"), purpose, limit, order
        )
        return Response(body, media_type="application/json")

    async def show(self, request: Request) -> Response:
        """One file."""
        return json_response(to_file(await self._find(request)))

    async def content(self, request: Request) -> Response:
        """The bytes of a file."""
        record = await self._find(request)
        return await content_response(self._service, record)

    async def delete(self, request: Request) -> Response:
        """Delete a file; 409 while a job reads it."""
        principal = principal_of(request.scope)
        record = await self._find(request)
        check_purpose(principal, record.purpose)
        await self._service.ask(self._service.store.delete, record.id, record.tenant)
        await self._service.remove_content(record.location)
        return JSONResponse(DeletedFile(id=record.id).model_dump())

    async def _find(self, request: Request) -> FileRecord:
        tenant = tenant_of(principal_of(request.scope))
        return await self._service.ask(self._service.store.get, request.path_params["file_id"], tenant)

    def _page(self, tenant: str, after: str | None, purpose: str | None, limit: int, order: str) -> bytes:
        records = self._service.store.page(
            tenant, purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
        )
        return page_json(records[:limit], len(records) > limit)


class NoResponse(Response):
    """Sends nothing: the client has left."""

    async def __call__(self, *args: Any) -> None:
        """Send nothing."""


async def record_content(service: FileService, location: str, work: Callable[..., R], *args: Any, **options: Any) -> R:
    """The record that `work` makes for a stored content, which is removed unless the record has it."""
    try:
        record = await service.ask(work, *args, **options)
    except ApiError as error:
        # After a 503 the database may have the record; if it has not, the janitor removes the content.
        if error.status != 503:
            await service.remove_content(location)
        raise
    if record.location != location:
        await service.remove_content(location)
    return record


def read_form(form: Form) -> FileForm:
    """The fields of an upload; ApiError 400 for values that cannot be, and for an empty file."""
    values: dict[str, Any] = {}
    for name, value in form.fields.items():
        outer, bracket, inner = name.partition("[")
        group = values.setdefault(outer, {}) if bracket and inner.endswith("]") else None
        if isinstance(group, dict):
            is_number = inner == "seconds]" and value.isascii() and value.isdecimal() and len(value) < 12
            group[inner[:-1]] = int(value) if is_number else value
        else:
            values[name] = value
    options = validated(FileForm, values)
    if not form.file_bytes:
        raise ApiError(400, "The file is empty.", code="empty_file", param="file")
    return options


def checked_filename(name: str, param: str) -> str:
    """The last part of a client's file name; ApiError 400 for one that is too long or has control characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    if not 0 < len(last) <= LONGEST_FILENAME or any(ord(character) < 32 or ord(character) == 127 for character in last):
        raise ApiError(
            400,
            f"The file name has {len(last)} characters, or control characters; give one of 1 to {LONGEST_FILENAME} characters.",
            param=param,
        )
    return last


def _check_field(principal: Principal, name: str, value: str) -> None:
    """ApiError as soon as a form has a purpose that cannot be, so that the file is not read in vain."""
    if name == "purpose":
        options = validated(FileForm, {"purpose": value})
        check_purpose(principal, Purpose(options.purpose))
