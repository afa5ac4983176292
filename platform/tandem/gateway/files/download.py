"""Contents of files sent to clients: read in threads, a piece in memory, ended for clients that read nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import IO, Any
from urllib.parse import quote

from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from tandem.files.content import open_content
from tandem.files.records import FileRecord
from tandem.gateway.files.service import FileService

PIECE_BYTES = 256 * 1024


async def content_response(service: FileService, record: FileRecord) -> Response:
    """A response with the bytes of a file; ApiError if its content cannot be read."""
    file = await service.store_content(open_content, record.location)
    return ContentResponse(service, record, file)


class ContentResponse(StreamingResponse):
    """The bytes of an open file, which is closed at the end."""

    def __init__(self, service: FileService, record: FileRecord, file: IO[bytes]) -> None:
        super().__init__(
            self._pieces(),
            media_type="application/octet-stream",
            headers={
                "Content-Length": str(record.size_bytes),
                "Content-Disposition": f"attachment; filename*=UTF-8''{quote(record.filename, safe='')}",
                "Cache-Control": "no-store",
            },
        )
        self._service = service
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the file."""
        stall_s = self._service.config.client_stall_s

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(stall_s):
                await send(message)

        try:
            # The server closes the connection of an answer that is not whole.
            with contextlib.suppress(TimeoutError):
                await super().__call__(scope, receive, send_in_time)
        finally:
            await asyncio.shield(self._service.store_content(self._file.close))

    async def _pieces(self) -> AsyncIterator[Any]:
        while piece := await self._service.store_content(self._file.read, PIECE_BYTES):
            yield piece
