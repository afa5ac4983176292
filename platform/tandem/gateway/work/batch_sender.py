"""Sender of batches' requests: one request through the gateway's own routes, as the key that made the batch.

Nothing of a request or an answer is parsed on the event loop, where a large one would stop the streams of all clients.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic_core import to_json
from starlette.types import ASGIApp, Receive, Scope, Send

from tandem.api.bounded_json import TooManyValuesError
from tandem.auth.principal import Principal
from tandem.errors import DataError, RegistryUnreachableError, StorageError, TandemError
from tandem.gateway.dialect import dialect_of
from tandem.gateway.errors import REQUEST_ID
from tandem.gateway.identity.authentication import PRINCIPAL
from tandem.gateway.work.open_files import OpenFiles
from tandem.jobs.batches.answers import AnswerLine, output_line
from tandem.jobs.batches.requests import InputFile, RequestPlace
from tandem.jobs.work.records import Item, Lease

PRIORITY = 1000
"""Priority of batches' requests: after a client's, who cannot give one below 0 without a right to."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Least and most seconds until a request is sent again that was refused for the moment."""
REFUSALS = (429, 503)
"""Statuses of a request that was refused for the moment, for its tenant's limits or for lack of room or of a replica."""
USAGE_BYTES = 4096
"""Bytes at the end of an answer that have its usage."""
TOKENS = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,9})')
NOT_JSON = b'{"error": {"message": "The answer is not JSON.", "type": "server_error", "code": null, "param": null}}'

PrincipalOf = Callable[[str, str, tuple[str, ...]], Principal | None]
"""From key id, tenant and the models of a token to the caller; None: that key has ended."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The end of an attempt at one request."""

    item: Item
    answer: AnswerLine | None = None
    error: str | None = None
    """Set where there is no answer."""
    retryable: bool = True
    retry_after_s: float | None = None
    """Set where the request was refused for the moment: it is to be sent again after so many seconds."""
    num_tokens: int = 0
    """Tokens that an engine generated for it; 0: none, or it has answered nothing."""

    @property
    def lease(self) -> Lease:
        """The lease under which the request was sent."""
        assert self.item.lease is not None
        return self.item.lease


class BatchSender:
    """Sends requests."""

    def __init__(self, app: ASGIApp, principal_of: PrincipalOf, max_body_bytes: int) -> None:
        """`app`: the routes of models, without authentication. `max_body_bytes`: of a request."""
        self._app = app
        self._principal_of = principal_of
        self._max_body_bytes = max_body_bytes
        # One thread: a file is read at one place at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-requests")
        self._inputs = OpenFiles[InputFile]()

    def close(self) -> None:
        """End the thread, which closes the input files."""
        self._thread.submit(self._inputs.close)
        self._thread.shutdown(wait=False)

    async def close_unused(self) -> None:
        """Close input files that no request needs."""
        await self._in_thread(self._inputs.close_unused)

    async def send(self, item: Item) -> Outcome:
        """Send one request; never raises but for its cancellation."""
        try:
            return await self._send(item)
        except DataError as error:
            return Outcome(item=item, error=str(error), retryable=False)
        except (StorageError, RegistryUnreachableError) as error:
            return Outcome(item=item, error=str(error), retry_after_s=LONGEST_PAUSE_S)
        except TandemError as error:
            return Outcome(item=item, error=str(error))
        except Exception as error:
            log.exception("A request of the batch %s failed.", item.job)
            return Outcome(item=item, error=f"{type(error).__name__}: {error}")

    async def _send(self, item: Item) -> Outcome:
        payload = item.payload or {}
        principal = self._principal_of(item.key_id, item.tenant, tuple(payload.get("models", ())))
        if principal is None:
            return Outcome(item=item, error=f"The API key {item.key_id} has ended.", retryable=False)
        place = RequestPlace.parse(str(item.payload_reference))
        if place.length > self._max_body_bytes:
            size = f"The request's line has {place.length} bytes; at most {self._max_body_bytes} are taken"
            return self._too_large(item, f"{size} (gateway.max_body_bytes).")
        try:
            body = await self._in_thread(self._read, str(payload["file"]), place)
        except TooManyValuesError as error:
            return self._too_large(item, str(error))
        transport = httpx.ASGITransport(_AsCaller(self._app, principal), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            headers = {"Content-Type": "application/json"}
            response = await client.post(payload["url"], content=body, headers=headers)
        if (pause_s := _pause_s(response)) is not None:
            return Outcome(item=item, error=f"status {response.status_code}", retry_after_s=pause_s)
        if response.status_code >= 500 and item.failures + 1 < item.max_attempts:
            text = response.content[:2000].decode(errors="replace")[:500]
            return Outcome(item=item, error=f"status {response.status_code}: {text}")
        answer = await self._in_thread(_answer_line, item, response)
        return Outcome(item=item, answer=answer, num_tokens=_num_tokens(response))

    def _read(self, location: str, place: RequestPlace) -> bytes:
        """The body of a request as it is sent."""
        body = self._inputs.get(location, lambda: InputFile(location)).body(place)
        return to_json(body | {"priority": max(PRIORITY, _number(body.get("priority"))), "stream": False})

    def _too_large(self, item: Item, message: str) -> Outcome:
        payload = item.payload or {}
        request_id = f"batch-{uuid.uuid4().hex}"
        error = dialect_of(payload["url"]).error(413, message, code=None, param=None, request=request_id)
        answer = output_line(item.id, payload["custom_id"], 413, request_id, json.dumps(error).encode())
        return Outcome(item=item, answer=answer)

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)


class _AsCaller:
    """The routes of models as one caller reaches them."""

    def __init__(self, app: ASGIApp, principal: Principal) -> None:
        self._app = app
        self._principal = principal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, PRINCIPAL: self._principal, REQUEST_ID: f"batch-{uuid.uuid4().hex}"}, receive, send)


def _pause_s(response: httpx.Response) -> float | None:
    """Seconds after which a refused request is to be sent again; None: the response is its answer."""
    if response.status_code not in REFUSALS or response.headers.get("x-should-retry") == "false":
        return None
    asked_s = response.headers.get("retry-after", "")
    return min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, float(asked_s) if asked_s.isdecimal() else 0.0))


def _answer_line(item: Item, response: httpx.Response) -> AnswerLine:
    payload: Mapping[str, Any] = item.payload or {}
    is_json = response.headers.get("content-type", "").partition(";")[0].strip() == "application/json"
    request_id = response.headers.get("x-request-id", "")
    body = response.content if is_json else NOT_JSON
    return output_line(item.id, payload["custom_id"], response.status_code, request_id, body)


def _num_tokens(response: httpx.Response) -> int:
    """The tokens of an answer, found in its usage, which is near its end; 1 for one without, such as a vector; 0 for an error."""
    if response.status_code != 200:
        return 0
    found = TOKENS.findall(response.content[-USAGE_BYTES:])
    return max(1, int(found[-1])) if found else 1


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
