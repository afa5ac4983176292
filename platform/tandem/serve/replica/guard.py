"""Guard of an engine's app: checks the replica's token, allows listed routes only, loads the request's adapter."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tandem.engine.protocol import AdapterRef, Engine
from tandem.engine.routes import ALLOWED
from tandem.engine.usage import counting_tokens
from tandem.errors import AdapterError, EngineError, StorageError
from tandem.routing.records import ALIVE_PATH, TOKEN_HEADER, UNAVAILABLE_HEADER, adapter_from_headers
from tandem.serve.replica.adapters import AdapterSlots, SlotsBusyError
from tandem.serve.replica.answer import GuardedAnswer, RecordUsage, usage_labels
from tandem.tasks import discard

ADAPTER_REFUSED = "adapter_refused"
"""Code of the error for an adapter whose files cannot be served."""
LOAD_PATH, UNLOAD_PATH = "/tandem/adapters/load", "/tandem/adapters/unload"


class Guard:
    """ASGI middleware around an engine. Plain ASGI, so that a disconnect reaches the engine and bytes pass untouched."""

    def __init__(
        self,
        engine: Engine,
        slots: AdapterSlots,
        token: str,
        on_death: Callable[[], None] = lambda: None,
        record_usage: RecordUsage | None = None,
    ) -> None:
        """`record_usage` gets the labels and token counts of each request that has labels, once it has ended."""
        self._engine = engine
        self._record_usage = record_usage
        self._slots = slots
        self._token = token.encode()
        self._on_death = on_death
        self.draining = False
        """Set to refuse new requests with 503."""
        self.in_flight = 0
        """Requests that were taken and have not ended, including those that wait for an adapter."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "lifespan":
            await self._engine.app(scope, receive, send)
            return
        if scope["type"] != "http":
            # A websocket: the engine's own routes (/v1/realtime) are not offered.
            await send({"type": "websocket.close", "code": 1008})
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if not hmac.compare_digest(headers.get(TOKEN_HEADER.encode(), b""), self._token):
            await _refuse(send, 401, "This engine answers its gateway only.")
        elif (scope["method"], scope["path"]) in ALLOWED:
            await self._serve(scope, receive, send, adapter_from_headers(headers))
        elif (scope["method"], scope["path"]) == ("GET", ALIVE_PATH):
            ready = not self.draining and self._engine.healthy
            await _json(send, 200 if ready else 503, {"ready": ready})
        elif scope["method"] == "POST" and scope["path"] in (LOAD_PATH, UNLOAD_PATH):
            await self._control(scope, receive, send)
        else:
            await _refuse(send, 404, f"No route {scope['method']} {scope['path']} here.")

    async def _serve(self, scope: Scope, receive: Receive, send: Send, adapter: AdapterRef | None) -> None:
        if self.draining:
            await _refuse(send, 503, "This replica is about to end.", unavailable="draining")
        elif not self._engine.healthy:
            await self._refuse_dead(send, "dead")
        else:
            self.in_flight += 1
            try:
                await self._serve_admitted(scope, receive, send, adapter)
            finally:
                self.in_flight -= 1

    async def _serve_admitted(self, scope: Scope, receive: Receive, send: Send, adapter: AdapterRef | None) -> None:
        if adapter is None:
            await self._call_engine(scope, receive, send)
            return
        try:
            if self._slots.is_ready(adapter):
                async with self._slots.hold(adapter):
                    await self._call_engine(scope, receive, send)
            else:
                await self._wait_and_call_engine(scope, ReadAhead(receive), send, adapter)
        except (SlotsBusyError, StorageError) as error:
            await _refuse(send, 503, str(error), unavailable="adapters")
        except AdapterError as error:
            await _refuse(send, 400, str(error), code=ADAPTER_REFUSED)
        except EngineError as error:
            if self._engine.healthy:
                await _refuse(send, 500, str(error))
            else:
                await self._refuse_dead(send, "died")

    async def _wait_and_call_engine(self, scope: Scope, receive: ReadAhead, send: Send, adapter: AdapterRef) -> None:
        """Wait for the adapter, for no longer than the client does: one that leaves takes no slot."""
        async with contextlib.AsyncExitStack() as resources:
            hold_task = asyncio.ensure_future(resources.enter_async_context(self._slots.hold(adapter)))
            disconnect_task = asyncio.ensure_future(receive.disconnected())
            try:
                await asyncio.wait((hold_task, disconnect_task), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await discard(disconnect_task)
                if not hold_task.done():
                    await discard(hold_task)
            if not hold_task.cancelled():
                hold_task.result()
                await self._call_engine(scope, receive, send)

    async def _call_engine(self, scope: Scope, receive: Receive, send: Send) -> None:
        with counting_tokens() as tokens:
            labels = usage_labels(scope)
            answer = GuardedAnswer(send, self._engine, tokens, labels, lambda: self._refuse_dead(send, "died"))
            try:
                await self._engine.app(scope, receive, answer.send)
            finally:
                if self._record_usage is not None and answer.is_charged:
                    self._record_usage(*answer.usage)

    async def _refuse_dead(self, send: Send, reason: str) -> None:
        self._on_death()
        await _refuse(
            send, 503, "The engine of this replica has died; the replica is being replaced.", unavailable=reason
        )

    async def _control(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = json.loads(await _body(receive))
            if scope["path"] == LOAD_PATH:
                await self._slots.load(AdapterRef(id=body["id"], path=body["path"], digest=body.get("digest")))
                done = True
            else:
                done = await self._slots.unload(body["id"])
        except (ValueError, KeyError, TypeError) as error:
            await _refuse(send, 400, f"The body must be JSON with an adapter's id (and path): {error!r}.")
        except (SlotsBusyError, StorageError) as error:
            await _refuse(send, 503, str(error), unavailable="adapters")
        except AdapterError as error:
            await _refuse(send, 400, str(error), code=ADAPTER_REFUSED)
        except EngineError as error:
            await _refuse(send, 500, str(error))
        else:
            await _json(send, 200, {"done": done, "adapters": list(self._slots.resident)})


class ReadAhead:
    """An ASGI `receive` whose messages may be read before the app asks for them, to see a disconnect."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._messages: deque[Message] = deque()

    async def disconnected(self) -> None:
        """Wait until the client has disconnected; its messages until then are kept for the app."""
        while not self._messages or self._messages[-1]["type"] != "http.disconnect":
            self._messages.append(await self._receive())

    async def __call__(self) -> Message:
        """The next message; a disconnect again and again."""
        if not self._messages:
            return await self._receive()
        return self._messages[0] if self._messages[0]["type"] == "http.disconnect" else self._messages.popleft()


async def _body(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


async def _refuse(
    send: Send, status: int, message: str, *, unavailable: str | None = None, code: str | None = None
) -> None:
    error_type = "server_error" if status >= 500 else "invalid_request_error"
    error = {
        "message": message,
        "type": error_type,
        "param": "model" if code == ADAPTER_REFUSED else None,
        "code": code,
    }
    await _json(send, status, {"error": error}, {UNAVAILABLE_HEADER: unavailable} if unavailable else {})


async def _json(send: Send, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
    body = json.dumps(value).encode()
    raw_headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw_headers += [(name.encode(), header_value.encode()) for name, header_value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": raw_headers})
    await send({"type": "http.response.body", "body": body})
