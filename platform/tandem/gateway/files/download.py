"""Contents of files sent to clients: read in threads, a piece in memory, ended for clients that read nothing."""

from __future__ import annotations

import asyncio
from typing import IO
from urllib.parse import quote

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tandem.files.content import open_content
from tandem.files.records import FileRecord
from tandem.gateway.files.service import FileService
from tandem.tasks import discard

PIECE_BYTES = 256 * 1024


async def content_response(service: FileService, record: FileRecord) -> Response:
    """A response with the bytes of a file; ApiError if its content cannot be read."""
    file = await service.store_content(open_content, record.location)
    return ContentResponse(service, record, file)


class ContentResponse(Response):
    """The bytes of an open file, which is closed at the end."""

    def __init__(self, service: FileService, record: FileRecord, file: IO[bytes]) -> None:
        super().__init__(
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
        """Send the file. The server closes the connection of an answer that is not whole."""
        left = asyncio.create_task(_client_left(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                await self._send_pieces(send, left)
            if not left.done():
                await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return
        finally:
            await discard(left)
            await asyncio.shield(self._service.store_content(self._file.close))

    async def _send_pieces(self, send: Send, left: asyncio.Task[None]) -> None:
        """Send all bytes; TimeoutError if the client reads none for `client_stall_s`."""
        while not left.done() and (piece := await self._service.store_content(self._file.read, PIECE_BYTES)):
            async with asyncio.timeout(self._service.config.client_stall_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _client_left(receive: Receive) -> None:
    """Wait until the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
