"""Connection to an engine over HTTP: one request at a time, its answer parsed by httptools.

A request is written where it is made, not in a task of its own: with many requests at once each is on its way before the next one
is looked at. Chunks of an answer are handed on as they are read from the socket (docs/adr/0033).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httptools

from tandem.cluster.keepalive import keep_alive

UNREACHABLE_S = 15
"""Seconds after which a connection to a replica whose machine acknowledges nothing has ended, streams on it too."""
PIECE_BYTES = 64 * 1024
"""Bytes of a body that are written at once."""
READ_AHEAD_BYTES = 128 * 1024
"""Bytes of an answer that wait for its reader; at more the connection is not read."""
MAX_HEAD_BYTES = 1 << 20
"""Longest head of an engine's answer: `metadata` of embeddings describes each input by about 110 bytes."""


class EngineHttpError(Exception):
    """A request to an engine failed."""


class NotConnectedError(EngineHttpError):
    """There was no connection: the engine cannot have begun with the request."""


class ConnectionLostError(EngineHttpError):
    """The connection ended before the answer did."""


class SilentEngineError(EngineHttpError):
    """The engine sent nothing for too long."""


class InvalidAnswerError(EngineHttpError):
    """The answer is no HTTP, or its head is too long."""


class EngineAnswer:
    """The answer to one request, from the first byte of its head on. Its reader ends with `close`."""

    def __init__(self, connection: EngineConnection, silent_s: float) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """By their names in lower case; the last one of each name."""
        self._connection = connection
        self._silent_s = silent_s
        self._parts: list[bytes] = []
        self._size = 0
        self._has_head = False
        self._ended = False
        self._error: EngineHttpError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._last_read = self._loop.time()
        self._silence = self._loop.call_later(silent_s, self._check_silence)

    @property
    def has_head(self) -> bool:
        """Whether status and headers have been read."""
        return self._has_head

    @property
    def ended(self) -> bool:
        """Whether the whole answer has been read from the socket."""
        return self._ended

    @property
    def content_type(self) -> str:
        """The media type, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        """The announced length of the body in bytes."""
        value = self.headers.get("content-length", "")
        return int(value) if value.isascii() and value.isdecimal() else None

    async def wait_for_head(self) -> None:
        """Wait until status and headers have been read. Raises EngineHttpError."""
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self.changed()

    async def read_any(self) -> bytes:
        """The bytes of the body that have arrived, at least one; b"" at its end. Raises EngineHttpError."""
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._ended:
                return b""
            await self.changed()
        parts, self._parts, self._size = self._parts, [], 0
        self._connection.resume()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self) -> bytes:
        """The rest of the body. Raises EngineHttpError."""
        parts = []
        while part := await self.read_any():
            parts.append(part)
        return b"".join(parts)

    async def changed(self) -> None:
        """Wait until something has arrived, the connection has ended, or more can be written."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def close(self) -> None:
        """No more is read: the connection goes back to its pool, or ends where the answer has not."""
        self._silence.cancel()
        self._connection.release(self)

    # Called by the connection:

    def add_header(self, name: str, value: str) -> None:
        """One header of the head."""
        self.headers[name] = value

    def set_head(self, status: int) -> None:
        """The head is whole."""
        self.status, self._has_head = status, True
        self.wake()

    def add_part(self, data: bytes) -> None:
        """Bytes of the body."""
        self._parts.append(data)
        self._size += len(data)
        if self._size > READ_AHEAD_BYTES:
            self._connection.pause()
        self.wake()

    def end(self) -> None:
        """The answer is whole."""
        self._ended = True
        self.wake()

    def fail(self, error: EngineHttpError) -> None:
        """The answer ends incomplete; the bytes that have arrived can still be read."""
        if not self._ended and self._error is None:
            self._error = error
        self.wake()

    def note_read(self) -> None:
        """Bytes have arrived."""
        self._last_read = self._loop.time()

    def wake(self) -> None:
        """Resume the coroutine in `changed`."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check_silence(self) -> None:
        remaining_s = self._last_read + self._silent_s - self._loop.time()
        # While the connection is not read, it is unknown whether the engine is silent.
        if remaining_s > 0 or self._connection.is_paused:
            self._silence = self._loop.call_later(max(remaining_s, 0.1), self._check_silence)
        elif not self._ended:
            self.fail(SilentEngineError(f"nothing for {self._silent_s:g} s"))


class EngineConnection(asyncio.Protocol):
    """One connection to a replica; `answer` is the one being read on it, if any."""

    def __init__(self, on_release: Callable[[EngineConnection], None]) -> None:
        self.answer: EngineAnswer | None = None
        self.idle_since = 0.0
        """Monotonic time since which no request is on it."""
        self.is_paused = False
        """Whether it is not read, because its reader is slower than the engine."""
        self._on_release = on_release
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._read_bytes = 0
        """Bytes that came before the head was whole."""
        self._head_bytes = 0
        """Bytes of the headers so far."""
        self._until_close = False
        self._keep_alive = False
        self._can_write = True

    # Called by the pool and by readers of answers:

    @property
    def is_open(self) -> bool:
        """Whether a request can be written to it."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, head: bytes, body: bytes, silent_s: float) -> EngineAnswer:
        """Write a request; its answer is still to be read, by `EngineAnswer.wait_for_head` first.

        It returns before the body is written where the engine answers or ends before that. Raises NotConnectedError.
        """
        if self._transport is None or self._transport.is_closing():
            raise NotConnectedError("closed by the engine")
        assert self.answer is None
        self._read_bytes = self._head_bytes = 0
        self._until_close = False
        answer = self.answer = EngineAnswer(self, silent_s)
        try:
            if len(body) <= PIECE_BYTES:
                self._transport.write(head + body)
                return answer
            # Written at once, the bytes above the socket's buffer would be copied, and block the event loop meanwhile.
            self._transport.write(head)
            for start in range(0, len(body), PIECE_BYTES):
                self._transport.write(body[start : start + PIECE_BYTES])
                while not self._can_write and self.is_open and not answer.has_head:
                    await answer.changed()
                if answer.has_head or not self.is_open:
                    break
        except BaseException:
            answer.close()
            raise
        return answer

    def release(self, answer: EngineAnswer) -> None:
        """Return the connection to its pool, or end it if the answer was not read whole."""
        if self.answer is not answer:
            return
        self.answer = None
        self.resume()
        if not answer.ended or not self._keep_alive:
            self.abort()
        self._on_release(self)

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Read no more for now."""
        if not self.is_paused and self._transport is not None and not self._transport.is_closing():
            self.is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.is_paused and self._transport is not None and not self._transport.is_closing():
            self.is_paused = False
            self._transport.resume_reading()

    # Called by the event loop:

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called once it is open."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = transport  # type: ignore[assignment]
        keep_alive(transport, unreachable_s=UNREACHABLE_S)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes."""
        answer = self.answer
        if answer is None:  # nothing was asked
            self.abort()
            return
        answer.note_read()
        if not answer.has_head:
            self._read_bytes += len(data)
        try:
            self._parser.feed_data(data)
            if not answer.has_head:
                check_head(self._read_bytes)
        except (httptools.HttpParserError, InvalidAnswerError) as error:
            answer.fail(InvalidAnswerError(str(error)))
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Called when it has ended."""
        if self.answer is not None:
            if self._until_close and error is None:
                self.answer.end()
            else:
                self.answer.fail(ConnectionLostError(str(error or "closed by the engine")))
        self._on_release(self)

    def pause_writing(self) -> None:
        """The connection takes no more bytes for now."""
        self._can_write = False

    def resume_writing(self) -> None:
        """It takes bytes again."""
        self._can_write = True
        if self.answer is not None:
            self.answer.wake()

    # Called by the parser:

    def on_message_begin(self) -> None:
        """An answer begins; without a request it is an error."""
        if self.answer is None or self.answer.ended:
            raise InvalidAnswerError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, of a head or of the trailers of a body in chunks, which are left out."""
        assert self.answer is not None
        if not self.answer.has_head:
            self._head_bytes += len(name) + len(value)
            check_head(self._head_bytes)
            self.answer.add_header(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        assert self.answer is not None
        status = self._parser.get_status_code()
        if status < 200:  # 100 and 103 come before the answer
            self.answer.headers.clear()
            return
        headers = self.answer.headers
        self._until_close = "content-length" not in headers and "transfer-encoding" not in headers and status != 204
        # For answers that end with their connection it is false.
        self._keep_alive = self._parser.should_keep_alive()
        self.answer.set_head(status)

    def on_body(self, data: bytes) -> None:
        """Bytes of the body, without the framing of chunks."""
        assert self.answer is not None
        self.answer.add_part(data)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        assert self.answer is not None
        if self.answer.has_head:
            self.answer.end()


def check_head(size: int) -> None:
    """InvalidAnswerError for a head that is too long."""
    if size > MAX_HEAD_BYTES:
        raise InvalidAnswerError(f"a head of more than {MAX_HEAD_BYTES:,} bytes")
