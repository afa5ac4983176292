"""Protocol between the directory, replicas and gateways: frames of JSON over TCP connections of its own.

Heartbeats of a thousand replicas are more calls a second than a Serve handle takes, and cost a fraction of it here. A frame is
its length as four bytes, big-endian, and a JSON object. The client's first frame is a `Hello`, with a token that it got through
Ray, and with the purpose of the connection. On one to report, replicas send a `ReplicaChange` (empty: a heartbeat) or `LEAVE` and
get a `HeartbeatReply` whenever that differs. On one to watch, gateways send `PING` and get a `Push` at each change, at least
every second. On one for limits, they send an `Exchange` with the shared ledger and get its `Answer`.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import ConfigDict, TypeAdapter

from tandem.errors import TandemError
from tandem.limits import Answer, Exchange
from tandem.routing.changes import Changes, ReplicaChange, Update
from tandem.routing.records import HeartbeatReply, Snapshot

LENGTH = struct.Struct(">I")
LONGEST_HELLO = 4096
"""Bytes of a frame before its sender has shown the token."""
LONGEST_REPORT = 4 * 2**20
"""Bytes of a frame to the directory: a record with some ten thousand adapters."""
LONGEST_PUSH = 256 * 2**20
"""Bytes of a frame to a gateway: a snapshot of some hundred thousand replicas."""
LONGEST_EXCHANGE = 64 * 2**20
"""Bytes of an exchange about limits: all requests in flight at a gateway, and the day's tokens of a million keys."""
LONGEST_ID = 256
"""Bytes within which the id of a change ends."""
LEAVE, PING = b'"leave"', b'"ping"'
UNREACHABLE_S = 6
"""Seconds after which a connection whose other side's machine acknowledges nothing has ended."""


Purpose = Literal["report", "watch", "limits"]


class ProtocolError(TandemError):
    """The other side sent a frame that it must not send."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectoryAddress:
    """Host and port of a directory, and the secret that its clients send."""

    host: str
    port: int
    token: str = field(repr=False)
    tls: bool = False
    """Whether it speaks TLS, to processes of its app only (`app_tls`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello:
    """First frame of a connection."""

    token: str = field(repr=False)
    purpose: Purpose = "report"
    """What the connection is for: a replica's reports, a gateway's updates, or its exchanges with the ledger of limits."""
    epoch: int = 0
    version: int = 0
    """Of one to watch: the epoch and version of the gateway's copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """An update for a gateway."""

    snapshot: Snapshot | None = None
    changes: Changes | None = None


_HELLO = TypeAdapter(Hello)
_CHANGE = TypeAdapter(ReplicaChange)
_CHANGES = TypeAdapter(list[ReplicaChange])
_REPLY = TypeAdapter(HeartbeatReply)
_PUSH = TypeAdapter(Push)
# Waiting times and limits can be infinite.
_EXCHANGE = TypeAdapter(Exchange, config=ConfigDict(ser_json_inf_nan="constants"))
_ANSWER = TypeAdapter(Answer, config=ConfigDict(ser_json_inf_nan="constants"))


def encode_hello(hello: Hello) -> bytes:
    """The frame's content."""
    return _HELLO.dump_json(hello, exclude_defaults=True)


def decode_hello(content: bytes) -> Hello:
    """The hello; ValueError if it is none."""
    return _HELLO.validate_json(content)


def encode_change(change: ReplicaChange) -> bytes:
    """The frame's content."""
    return _CHANGE.dump_json(change, exclude_defaults=True)


def decode_change(content: bytes) -> ReplicaChange:
    """The change; ValueError if it is none."""
    return _CHANGE.validate_json(content)


def has_record(content: bytes) -> bool:
    """Whether an encoded change holds a whole record. The key `record` comes first after the id, which has a bounded length."""
    return b'","record":{' in content[:LONGEST_ID]


def decode_changes(contents: Sequence[bytes]) -> list[ReplicaChange | None]:
    """The changes in several frames, which is faster than one by one; None for a frame that holds none."""
    with contextlib.suppress(ValueError):
        changes = _CHANGES.validate_json(b"[" + b",".join(contents) + b"]")
        if len(changes) == len(contents):
            return list(changes)
    return [_change_or_none(content) for content in contents]


def _change_or_none(content: bytes) -> ReplicaChange | None:
    with contextlib.suppress(ValueError):
        return decode_change(content)
    return None


def encode_reply(reply: HeartbeatReply) -> bytes:
    """The frame's content."""
    return _REPLY.dump_json(reply, exclude_defaults=True)


def decode_reply(content: bytes) -> HeartbeatReply:
    """The reply; ValueError if it is none."""
    return _REPLY.validate_json(content)


def encode_update(update: Update) -> bytes:
    """The frame's content."""
    push = Push(snapshot=update) if isinstance(update, Snapshot) else Push(changes=update)
    return _PUSH.dump_json(push, exclude_defaults=True)


def decode_update(content: bytes) -> Update:
    """The update; ValueError if it is none."""
    push = _PUSH.validate_json(content)
    update = push.snapshot or push.changes
    if update is None:
        raise ValueError("The directory sent neither a snapshot nor changes.")
    return update


def encode_exchange(exchange: Exchange) -> bytes:
    """The frame's content."""
    return _EXCHANGE.dump_json(exchange)


def decode_exchange(content: bytes) -> Exchange:
    """The exchange; ValueError if it is none."""
    return _EXCHANGE.validate_json(content)


def encode_answer(answer: Answer) -> bytes:
    """The frame's content."""
    return _ANSWER.dump_json(answer)


def decode_answer(content: bytes) -> Answer:
    """The answer; ValueError if it is none."""
    return _ANSWER.validate_json(content)


def frame(content: bytes) -> bytes:
    """A frame."""
    return LENGTH.pack(len(content)) + content


@dataclass(slots=True)
class FrameReader:
    """Splits received bytes into frames."""

    limit: int
    """Longest frame in bytes."""
    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterable[bytes]:
        """The contents of the frames that are whole now; ProtocolError for one that is too long."""
        # Nearly always exactly one frame arrives: it needs no buffer.
        if not self._buffer and len(data) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(data)
            if LENGTH.size + length == len(data) and length <= self.limit:
                return (data[LENGTH.size :],)
        return self._split(data)

    def _split(self, data: bytes) -> Iterator[bytes]:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer, start)
            if length > self.limit:
                raise ProtocolError(f"A frame has {length} bytes; {self.limit} are allowed here.")
            end = start + LENGTH.size + length
            if len(self._buffer) < end:
                break
            content = bytes(self._buffer[start + LENGTH.size : end])
            start = end
            yield content
        del self._buffer[:start]
