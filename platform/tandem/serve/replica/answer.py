"""Answer of an engine, with token counts added; its head is sent only with the first body, when the engine is known to live.

With a dead engine vLLM answers 500, or 200 and an error as the first event of a stream. Nothing was generated, so another replica
may try; one only, since this request may have killed the engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.types import Message, Scope, Send

from tandem.engine.protocol import Engine
from tandem.engine.usage import RequestTokens
from tandem.usage.records import UsageCounts, UsageLabels
from tandem.usage.wire import COUNTS_HEADER, LABELS_HEADER, counts_to_comment, counts_to_header

RecordUsage = Callable[[UsageLabels, UsageCounts], None]


class GuardedAnswer:
    """The messages of one answer."""

    def __init__(
        self,
        send: Send,
        engine: Engine,
        tokens: RequestTokens,
        labels: UsageLabels | None,
        refuse: Callable[[], Awaitable[None]],
    ) -> None:
        """`labels`: labels of the request's usage; None: it is not counted. `refuse` sends the error of a dead engine."""
        self._send = send
        self._refuse = refuse
        self._engine = engine
        self._tokens = tokens
        self._labels = labels
        self._head: Message | None = None
        self._status = 0
        self._is_stream = False
        self.refused = False
        """Whether another answer was sent instead, because the engine is dead."""

    async def send(self, message: Message) -> None:
        """Send one message of the engine's app."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self._head, self._status = message, message["status"]
            self._is_stream = _is_stream(message)
            return
        if self._head is not None:
            if (self._status >= 500 or self._is_stream) and not self._engine.healthy:
                self.refused = True
                await self._refuse()
                return
            head, self._head = self._head, None
            if self._labels is not None and not self._is_stream:
                # All tokens of an answer that is no stream were generated before its head is sent.
                counts = (COUNTS_HEADER.encode(), counts_to_header(self._tokens.now))
                head = {**head, "headers": [*head["headers"], counts]}
            await self._send(head)
        if self._labels is not None and self._is_stream and not message.get("more_body"):
            message = {**message, "body": message.get("body", b"") + counts_to_comment(self._tokens.now)}
        await self._send(message)

    @property
    def is_charged(self) -> bool:
        """Whether the request counts: its engine has generated or answered something, and no other replica will."""
        return self._labels is not None and not self.refused and (0 < self._status < 400 or any(self._tokens.now))

    @property
    def usage(self) -> tuple[UsageLabels, UsageCounts]:
        """Labels and counts of the request."""
        assert self._labels is not None
        return self._labels, UsageCounts(1, *self._tokens.now)


def usage_labels(scope: Scope) -> UsageLabels | None:
    """Labels of the request's usage, from the gateway's header; None: it is not counted."""
    name = LABELS_HEADER.encode()
    return next((UsageLabels.from_header(value) for key, value in scope["headers"] if key == name), None)


def _is_stream(head: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in head["headers"])
