"""Reads from a request what the router wants to know of it: how its text begins, and whose conversation it is.

Nothing is tokenised and nothing is checked: a body that no engine will take gives an Ask all the same, and the engine says
what is wrong with it. What is read of a body is bounded, however large it is.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from tandem.gateway.catalog import Target
from tandem.serve.ask import MOST_BYTES, Ask, blocks_of, key_of

SESSION_HEADER = "x-session-id"
"""Names a conversation, in any API; before the fields of the body."""
SESSION_FIELDS = ("prompt_cache_key", "user", "safety_identifier")
"""OpenAI's fields that name a conversation or a person; the first that is set counts."""
MOST_PIECES = 256
"""Messages and parts of them that are looked at."""
PARTS = ("role", "name", "function", "description", "content", "text", "input")
"""What has text in a message, a part of one, or a tool."""
MOST_TOKENS = MOST_BYTES // 4
"""Of a prompt of token ids, which count 4 bytes each, as a token of English has letters."""


def read_ask(target: Target, body: Mapping[str, Any], headers: Mapping[str, str]) -> Ask:
    """The request as the router sees it. `body` is in any of the APIs' shapes."""
    blocks, size = blocks_of(
        target.adapter.id if target.adapter else target.base.id, itertools.islice(_pieces(body), MOST_PIECES)
    )
    session = _session(body, headers)
    return Ask(
        base=target.pool,
        adapter=target.adapter.id if target.adapter else None,
        blocks=blocks,
        size=size,
        session=None if session is None else key_of(session),
        pinned=target.pinned,
    )


def _session(body: Mapping[str, Any], headers: Mapping[str, str]) -> str | None:
    given: list[Any] = [headers.get(SESSION_HEADER), *(body.get(field) for field in SESSION_FIELDS)]
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        given.append(metadata.get("user_id"))  # Anthropic's
    return next((value[:MOST_BYTES] for value in given if isinstance(value, str) and value), None)


def _pieces(body: Mapping[str, Any]) -> Iterator[bytes]:
    """The text of a request in about the order in which a chat template has it."""
    for key in ("tools", "functions", "instructions", "system", "messages", "prompt", "input"):
        value = body.get(key)
        if value is not None:
            yield from _text(value)


def _text(value: Any) -> Iterator[bytes]:
    """The text of a prompt, a message, its content, a part of that, a tool, or a list of these.

    Of several prompts in one request the first stands for all: they go to one replica.
    """
    if isinstance(value, str):
        yield value[:MOST_BYTES].encode(errors="surrogatepass")
    elif isinstance(value, dict):
        role, content = value.get("role"), value.get("content")
        if isinstance(role, str) and isinstance(content, str):
            yield f"{role}\0{content[:MOST_BYTES]}\0".encode(errors="surrogatepass")
            return
        for key in PARTS:
            part = value.get(key)
            if part is not None:
                yield from _text(part)
        yield b"\0"
    elif isinstance(value, list) and value:
        if isinstance(value[0], int):
            try:
                yield array("I", value[:MOST_TOKENS]).tobytes()
            except (TypeError, OverflowError):
                return  # no prompt of any engine's
        elif isinstance(value[0], dict):
            for part in value:
                yield from _text(part)
        else:
            yield from _text(value[0])
