"""Uploaded files streamed from a request's body to storage.

Of each body at most `BUFFER_BYTES` and one chunk of the server are in memory, counted in the gateway's byte budget. A thread
parses and writes them, and the next bytes are read when it is done, so that a slow disk slows the client down.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from tandem.config.serving.app import GatewayConfig
from tandem.errors import TandemError
from tandem.files.content import ContentWriter
from tandem.gateway.errors import ApiError
from tandem.gateway.files.transit import UploadBytes
from tandem.gateway.requests.held_bytes import HeldBody
from tandem.gateway.requests.multipart import FRAME_BYTES, CheckField, Form, FormReader, boundary_of, too_large_error

T = TypeVar("T")

BUFFER_BYTES = 2**20
"""Bytes that are collected before a thread writes them."""
DISCARD_S = 10.0
"""Seconds for which the rest of a refused body is read: a client that still sends might not see the answer."""


class ClientLeftError(Exception):
    """The client has closed the connection before its body was whole."""


async def receive_form(
    request: Request,
    writer: ContentWriter,
    counted: UploadBytes,
    *,
    file_field: str,
    max_bytes: int,
    config: GatewayConfig,
    held_body: HeldBody,
    threads: Executor,
    check_field: CheckField | None = None,
) -> Form:
    """Write the file of a form to `writer`, count its bytes, and return its fields.

    ApiError 400, 413 or 415 for a body that is not taken, 408 for a client that is too slow, 503 if the gateway may hold no more
    bytes; FileQuotaError where the tenant sends more than it has room for; StorageError of the writer; ClientLeftError.
    """
    reader = FormReader(
        boundary_of(request.headers.get("content-type", "")),
        file_field=file_field,
        sink=functools.partial(_write, writer, counted),
        max_file_bytes=max_bytes,
        check_field=check_field,
    )
    if announced_bytes(request) > max_bytes + FRAME_BYTES:
        await discard_body(request, max_bytes)
        raise too_large_error(max_bytes)
    chunks = _chunks(request, config, held_body)
    buffer: list[bytes] = []
    num_buffered = num_read = 0
    is_whole = False
    try:
        async for chunk in chunks:
            buffer.append(chunk)
            num_buffered += len(chunk)
            num_read += len(chunk)
            if num_read > max_bytes + FRAME_BYTES:
                raise too_large_error(max_bytes)
            held_body.grow_to(num_buffered)
            if num_buffered >= BUFFER_BYTES:
                # What waits for the disk is no upload that has stalled.
                held_body.end()
                await in_thread(threads, _feed, reader, buffer)
                num_buffered = 0
                held_body.release()
        is_whole = True
        held_body.end()
        return await in_thread(threads, _finish, reader, buffer)
    except (ApiError, TandemError) as error:
        if not is_whole and getattr(error, "status", None) != 408:
            await discard_body(request, max_bytes)
        raise
    except ClientDisconnect:
        raise ClientLeftError from None
    finally:
        held_body.release()
        await chunks.aclose()


async def in_thread(threads: Executor, work: Callable[..., T], *args: object) -> T:
    """The result of blocking work; where this task is cancelled, the work has ended before the cancellation goes on.

    Else a writer would be discarded while a thread still writes to it.
    """
    future = asyncio.get_running_loop().run_in_executor(threads, work, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await asyncio.wait([future])
        raise


def announced_bytes(request: Request) -> int:
    """The Content-Length of a request; 0 without one."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdecimal() else 0


async def discard_body(request: Request, max_bytes: int) -> None:
    """Read what is left of a body and forget it, within `max_bytes` and `DISCARD_S`."""
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(DISCARD_S):
            num_read = 0
            while num_read <= max_bytes:
                message = await request.receive()
                num_read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _chunks(request: Request, config: GatewayConfig, held_body: HeldBody) -> AsyncGenerator[bytes]:
    """The chunks of a body, each within `upload_timeout_s`, and all within `files.upload_timeout_s`; ApiError 408 otherwise."""
    loop = asyncio.get_running_loop()
    end = loop.time() + config.files.upload_timeout_s
    stream = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout_at(min(end, loop.time() + config.upload_timeout_s)) as deadline:
                # The budget takes room from uploads that have stalled.
                held_body.begin(functools.partial(_expire, deadline))
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            held_body.grow_to(1)  # raises where the upload has made room for others
            raise ApiError(
                408,
                f"The upload was silent for {config.upload_timeout_s:g} s (gateway.upload_timeout_s), or not whole after "
                f"{config.files.upload_timeout_s:g} s (gateway.files.upload_timeout_s). Large files can be sent in parts: "
                "POST /v1/uploads.",
                code="upload_timeout",
            ) from None
        if chunk:
            yield chunk


def _expire(deadline: asyncio.Timeout) -> None:
    """End the wait for a chunk now; nothing happens if it has ended."""
    with contextlib.suppress(RuntimeError):
        deadline.reschedule(asyncio.get_running_loop().time())


def _write(writer: ContentWriter, counted: UploadBytes, chunk: bytes) -> None:
    counted.add(len(chunk))
    writer.write(chunk)


def _feed(reader: FormReader, buffer: list[bytes]) -> None:
    """Parse and write what is buffered; the buffer is empty then."""
    for chunk in buffer:
        reader.feed(chunk)
    buffer.clear()


def _finish(reader: FormReader, buffer: list[bytes]) -> Form:
    _feed(reader, buffer)
    return reader.end()
