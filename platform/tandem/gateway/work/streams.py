"""Responses from feeds: JSON lines of what there is, or server-sent events until the feed ends.

An event of a stream has an id; a client that reconnects sends it as `Last-Event-ID`, and gets what follows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tandem.gateway.errors import ApiError
from tandem.gateway.identity.authentication import principal_of, tenant_of
from tandem.gateway.work.calls import WorkCalls
from tandem.jobs.tracking.feeds import Chunk, Feed

LINES_TYPE, STREAM_TYPE = "application/x-ndjson", "text/event-stream"
POLL_S = 1.0
"""Seconds between two looks for new items of a stream."""
COMMENT_EVERY = 15
"""Looks without items after which a comment is sent: proxies end connections on which nothing is sent."""
M = TypeVar("M", bound=BaseModel)


def wants_stream(request: Request) -> bool:
    """Whether server-sent events are asked for, by `stream=true` or by `Accept`."""
    if (wanted := request.query_params.get("stream")) is not None:
        return wanted.lower() in ("true", "1")
    return STREAM_TYPE in request.headers.get("accept", "")


def wants_lines(request: Request) -> bool:
    """Whether JSON lines are asked for."""
    return LINES_TYPE in request.headers.get("accept", "")


class OpenStreams:
    """The streams of one gateway that wait for something new of a job; each asks the database again and again."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        """`limit`: streams of one tenant (`gateway.max_job_streams`)."""
        self._limit = limit
        self._retry_after_s = retry_after_s
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, tenant: str) -> Iterator[None]:
        """One more stream of a tenant is open within the block; ApiError 429 if the tenant has as many as it may."""
        if self._open[tenant] >= self._limit:
            raise ApiError(
                429,
                f"{self._limit} streams of jobs are open at this gateway, the most of one tenant (gateway.max_job_streams). End "
                "some, or ask without `stream`.",
                code="too_many_streams",
                headers={"Retry-After": str(self._retry_after_s)},
            )
        self._open[tenant] += 1
        try:
            yield
        finally:
            self._open[tenant] -= 1
            if not self._open[tenant]:
                del self._open[tenant]


class EventStream(StreamingResponse):
    """Server-sent events of a job; an open stream of its tenant for as long as it is sent."""

    def __init__(self, events: AsyncIterator[bytes], streams: OpenStreams, tenant: str) -> None:
        super().__init__(events, media_type=STREAM_TYPE, headers={"Cache-Control": "no-store"})
        self._streams = streams
        self._tenant = tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with self._streams.counted(self._tenant):
            await super().__call__(scope, receive, send)


class LineStream(Generic[M]):
    """One feed on its way to a client."""

    def __init__(self, feed: Feed[M], calls: WorkCalls, streams: OpenStreams, id_of: Callable[[M], str]) -> None:
        self._feed = feed
        self._calls = calls
        self._streams = streams
        self._id_of = id_of

    async def response(self, request: Request) -> Response:
        """The response; ApiError where the feed cannot be read at all."""
        first = await self._calls(self._feed.next)
        if wants_stream(request):
            return EventStream(self._events(first), self._streams, tenant_of(principal_of(request.scope)))
        return StreamingResponse(self._lines(first), media_type=LINES_TYPE, headers={"Cache-Control": "no-store"})

    async def _lines(self, chunk: Chunk[M]) -> AsyncIterator[bytes]:
        yield "".join(f"{item.model_dump_json()}\n" for item in chunk.items).encode()
        while chunk.has_more:
            chunk = await self._calls(self._feed.next)
            yield "".join(f"{item.model_dump_json()}\n" for item in chunk.items).encode()

    async def _events(self, chunk: Chunk[M]) -> AsyncIterator[bytes]:
        quiet = 0
        # So that the client sees at once that it is connected.
        yield b": stream\n\n"
        try:
            while True:
                for item in chunk.items:
                    yield f"id: {self._id_of(item)}\ndata: {item.model_dump_json()}\n\n".encode()
                if chunk.ended:
                    break
                quiet = 0 if chunk.items else quiet + 1
                if quiet and quiet % COMMENT_EVERY == 0:
                    yield b": nothing new\n\n"
                if not chunk.has_more:
                    await asyncio.sleep(POLL_S)
                chunk = await self._calls(self._feed.next)
        except ApiError as error:
            # The status is sent already. The client reconnects with the id of the last event.
            body = {"error": {"message": error.message, "code": error.code}}
            yield f"event: error\ndata: {json.dumps(body)}\n\n".encode()
            return
        yield b"data: [DONE]\n\n"
