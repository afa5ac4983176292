"""Hints of a request for the gateway: priority and deadlines for admission, session and text prefix for routing.

Nothing is tokenised, and fields for the engine are not validated: a body that no engine will take still gives a RoutingRequest,
and the engine reports the error. A bounded part of a body is read, however large it is.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from tandem.api.values import format_value
from tandem.config.serving.app import MAX_TIMEOUT_S
from tandem.gateway.admission.queue import SchedulingHints
from tandem.gateway.errors import ApiError
from tandem.gateway.models.catalog import ResolvedModel
from tandem.routing.request import MAX_HASHED_BYTES, RoutingRequest, hash_key, hash_prefixes

SESSION_HEADER = "x-session-id"
"""Header that names a conversation, in any API; takes precedence over the body."""
SESSION_FIELDS = ("prompt_cache_key", "user", "safety_identifier")
"""Fields of OpenAI's API that name a conversation or a user; the first that is set counts."""
MAX_TEXT_PARTS = 256
"""Messages, and parts of messages, that are read."""
TEXT_KEYS = ("role", "name", "function", "description", "content", "text", "input")
"""Keys with text in a message, a content part, or a tool."""
MAX_HASHED_TOKENS = MAX_HASHED_BYTES // 4
"""Token ids of a prompt that are hashed; each counts 4 bytes, about the letters of an English token."""
CLIENT_TIMEOUT_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
"""Headers in which OpenAI's and Anthropic's SDKs send their read timeout, in seconds."""
MAX_TOKENS_FIELDS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Fields of the APIs that limit the length of an answer."""
MAX_PRIORITY = 2**63 - 1


def take_scheduling_hints(
    body: dict[str, Any],
    headers: Mapping[str, str],
    arrived: float,
    *,
    keep_priority: bool = False,
    highest_priority: int | None = None,
    sequences: int = 1,
    tenant: str = "",
) -> SchedulingHints:
    """Priority and deadlines of a request, from `priority` and `timeout`, which are removed from the body, and its SDK's headers.

    `arrived`: the monotonic clock now. `keep_priority` leaves `priority` in the body for the engine. `highest_priority`: the most
    urgent priority that the request's key may use; a more urgent one is lowered to it. `sequences`: the number that the request
    starts. ApiError 400 for values out of range.
    """
    priority = body.pop("priority", None)
    if priority is None:
        priority = 0
    if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) > MAX_PRIORITY:
        raise ApiError(
            400,
            f"`priority` is {format_value(priority)}; it must be a whole number, lower is sooner.",
            param="priority",
        )
    if highest_priority is not None:
        priority = max(priority, highest_priority)
    if keep_priority:
        body["priority"] = priority
    timeout_s = body.pop("timeout", None)
    start_by = finish_by = math.inf
    client_timeout_s = _client_timeout_s(headers)
    if client_timeout_s is not None:
        # The first byte of a stream keeps the client connected; another answer must be complete by then.
        if body.get("stream"):
            start_by = arrived + client_timeout_s
        else:
            finish_by = arrived + client_timeout_s
    if timeout_s is not None:
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ApiError(
                400,
                f"`timeout` is {format_value(timeout_s)}; it must be a number of seconds above 0, at most {MAX_TIMEOUT_S:.0f}.",
                param="timeout",
            )
        finish_by = min(finish_by, arrived + timeout_s)
    length = next((body[key] for key in MAX_TOKENS_FIELDS if isinstance(body.get(key), int)), 0)
    # One kind for each power of two of the answer's length.
    return SchedulingHints(
        arrived=arrived,
        priority=priority,
        start_by=start_by,
        finish_by=finish_by,
        kind=min(64, length.bit_length()),
        sequences=sequences,
        tenant=tenant,
    )


def _client_timeout_s(headers: Mapping[str, str]) -> float | None:
    for name in CLIENT_TIMEOUT_HEADERS:
        try:
            seconds = float(headers.get(name, ""))
        except ValueError:
            continue
        if 0 < seconds < math.inf:
            return min(seconds, MAX_TIMEOUT_S)
    return None


def salt_cache(body: dict[str, Any], tenant: str) -> None:
    """Let the engine share a prefix cache among requests of one tenant only: from the time of a first token, a client could else
    learn which prompts others have sent. A client's own `cache_salt` divides the tenant's cache further.
    """
    if tenant:
        client_salt = body.get("cache_salt")
        text = f"{tenant}\0{client_salt if isinstance(client_salt, str) else ''}"
        body["cache_salt"] = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def read_routing_request(
    model: ResolvedModel, body: Mapping[str, Any], headers: Mapping[str, str], tenant: str = ""
) -> RoutingRequest:
    """The request for the router, from a body in any API's format; prefixes and sessions of each `tenant` are its own."""
    model_id = model.adapter.id if model.adapter else model.base.id
    prefix_hashes, size = hash_prefixes(
        f"{tenant}\0{model_id}" if tenant else model_id, itertools.islice(_text_parts(body), MAX_TEXT_PARTS)
    )
    session = _session(body, headers)
    return RoutingRequest(
        pool=model.pool,
        adapter=model.adapter.id if model.adapter else None,
        prefix_hashes=prefix_hashes,
        size=size,
        session=None if session is None else hash_key(f"{tenant}\0{session}" if tenant else session),
        pinned=model.pinned,
    )


def _session(body: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    candidates: list[Any] = [headers.get(SESSION_HEADER), *(body.get(field) for field in SESSION_FIELDS)]
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        candidates.append(metadata.get("user_id"))  # Anthropic's
    return next((value[:MAX_HASHED_BYTES] for value in candidates if isinstance(value, str) and value), None)


def _text_parts(body: Mapping[str, Any]) -> Iterator[bytes]:
    """The text of a request, roughly in the order of a chat template."""
    for key in ("tools", "functions", "instructions", "system", "messages", "prompt", "input"):
        value = body.get(key)
        if value is not None:
            yield from _text(value)


def _text(value: Any) -> Iterator[bytes]:
    """The text of a prompt, a message, its content, a part of that, a tool, or a list of these.

    Of several prompts in one request the first counts: all go to one replica.
    """
    if isinstance(value, str):
        yield value[:MAX_HASHED_BYTES].encode(errors="surrogatepass")
    elif isinstance(value, dict):
        role, content = value.get("role"), value.get("content")
        if isinstance(role, str) and isinstance(content, str):
            yield f"{role}\0{content[:MAX_HASHED_BYTES]}\0".encode(errors="surrogatepass")
            return
        for key in TEXT_KEYS:
            part = value.get(key)
            if part is not None:
                yield from _text(part)
        yield b"\0"
    elif isinstance(value, list) and value:
        if isinstance(value[0], int):
            try:
                yield array("I", value[:MAX_HASHED_TOKENS]).tobytes()
            except (TypeError, OverflowError):
                return  # not a valid prompt
        elif isinstance(value[0], dict):
            for part in value:
                yield from _text(part)
        else:
            yield from _text(value[0])
