"""Token counts of the HTTP request that an engine works on, from the engine's own counters.

The guard of a replica opens the counts of a request in a context variable; the engine adds a counter for each sequence that it
starts. Counters are read when the request has ended, however it ended: nothing is done for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class TokenCounts(NamedTuple):
    """Tokens that an engine has read and generated."""

    prompt: int = 0
    completion: int = 0


class RequestTokens:
    """The counters of one request."""

    def __init__(self) -> None:
        self._counters: dict[str, list[Callable[[], TokenCounts]]] = {}

    def add(self, prompt_id: str, counter: Callable[[], TokenCounts]) -> None:
        """Add the counter of one sequence. Sequences of one `prompt_id` share a prompt, which is counted once."""
        self._counters.setdefault(prompt_id, []).append(counter)

    @property
    def now(self) -> TokenCounts:
        """The counts so far; prompts that were not read yet count nothing."""
        prompt = completion = 0
        for counters in self._counters.values():
            counts = [counter() for counter in counters]
            prompt += max(count.prompt for count in counts)
            completion += sum(count.completion for count in counts)
        return TokenCounts(prompt, completion)


_current: ContextVar[RequestTokens | None] = ContextVar("request_tokens", default=None)


@contextmanager
def counting_tokens(tokens: RequestTokens | None = None) -> Iterator[RequestTokens]:
    """Counts of what is asked of an engine in this context, tasks started in it included; None: new ones."""
    tokens = RequestTokens() if tokens is None else tokens
    token = _current.set(tokens)
    try:
        yield tokens
    finally:
        _current.reset(token)


def current_tokens() -> RequestTokens | None:
    """The counts of the request of this context; None: they are not counted."""
    return _current.get()
