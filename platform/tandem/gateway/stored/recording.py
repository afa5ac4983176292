"""Copy of one answer while it is relayed, within the bytes that a gateway may hold for answers to be stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tandem.stored.records import AnswerKind


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerLabels:
    """What is known of an answer before it begins."""

    kind: AnswerKind
    tenant: str
    key_id: str
    model: str
    """As the request named it."""
    metadata: dict[str, str]
    previous_id: str | None
    idempotency_key: str | None = None
    """Digest of the request's key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A whole answer, as its client got it."""

    labels: AnswerLabels
    request: bytes
    chunks: tuple[bytes, ...]
    is_stream: bool
    num_bytes: int


class PendingBytes:
    """The bytes that one gateway holds of requests and answers that are not stored yet."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, num_bytes: int) -> bool:
        """Whether so many more bytes fit; then they are held."""
        if self.held + num_bytes > self.limit:
            return False
        self.held += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Bytes are not held any more."""
        self.held -= num_bytes


class Recording:
    """One answer: `add` each of its chunks, then `complete`; in any case `close`. Never raises, never waits."""

    __slots__ = ("_chunks", "_labels", "_max_bytes", "_num_bytes", "_on_end", "_pending", "_request", "lost")

    def __init__(
        self,
        labels: AnswerLabels,
        request: bytes,
        *,
        max_bytes: int,
        pending: PendingBytes,
        on_end: Callable[[Recording, Recorded | None], None],
    ) -> None:
        """`on_end` gets the whole answer, and with it the bytes that it holds, or None."""
        self._labels = labels
        self._request = request
        self._chunks: list[bytes] | None = []
        self._max_bytes = max_bytes
        self._pending = pending
        self._num_bytes = 0
        self._on_end: Callable[[Recording, Recorded | None], None] | None = on_end
        self.lost = ""
        """Why the answer cannot be stored; empty: it can, so far."""
        self._hold(len(request))

    @property
    def tenant(self) -> str:
        """The tenant whose answer it is."""
        return self._labels.tenant

    def add(self, chunk: bytes) -> None:
        """Copy a chunk that the client gets."""
        if self._chunks is not None and self._hold(len(chunk)):
            self._chunks.append(chunk)

    def complete(self, *, is_stream: bool) -> None:
        """The client has been sent the whole answer."""
        if self._chunks is None or self._on_end is None:
            return
        recorded = Recorded(
            labels=self._labels,
            request=self._request,
            chunks=tuple(self._chunks),
            is_stream=is_stream,
            num_bytes=self._num_bytes,
        )
        self._num_bytes = 0
        self._end(recorded)

    def close(self) -> None:
        """The request has ended; an answer that is not complete is not stored. May be called again."""
        self._drop()
        self._end(None)

    def _hold(self, num_bytes: int) -> bool:
        if self._num_bytes + num_bytes > self._max_bytes:
            self.lost = "too_large"
        elif not self._pending.take(num_bytes):
            self.lost = "gateway_full"
        else:
            self._num_bytes += num_bytes
            return True
        self._drop()
        return False

    def _drop(self) -> None:
        self._chunks, self._request = None, b""
        self._pending.give_back(self._num_bytes)
        self._num_bytes = 0

    def _end(self, recorded: Recorded | None) -> None:
        if (on_end := self._on_end) is not None:
            self._on_end = None
            on_end(self, recorded)
