"""In-process client of an ASGI app: one POST, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from starlette.types import ASGIApp, Message

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Answer(NamedTuple):
    """Status and body of a response."""

    status: int
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes, headers: Mapping[str, str] = NO_HEADERS) -> Answer:
    """One POST of JSON to an ASGI app in this process."""
    is_sent, status, chunks = False, 500, list[bytes]()

    async def receive() -> Message:
        nonlocal is_sent
        if is_sent:
            # The app waits for a disconnect; this client never disconnects.
            await asyncio.get_running_loop().create_future()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            chunks.append(message.get("body", b""))

    raw_headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw_headers += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": raw_headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    await app(scope, receive, send)
    return Answer(status, b"".join(chunks))
