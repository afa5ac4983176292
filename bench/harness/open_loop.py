"""Open-loop load: requests with Poisson arrivals at a fixed rate, each with a deadline; and closed-loop load, which measures
capacity. Raw sockets; answers are counted and not parsed.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

LENGTHS = (16, 32, 64)
"""Tokens of the answers, as many of each."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Result of one request."""

    scheduled_at: float
    """Planned send time, in seconds of `time.perf_counter`."""
    ended_at: float
    status: int
    """0: the connection broke."""
    retry_after: float | None
    tokens: int
    """Requested number of tokens."""


class Connection(asyncio.Protocol):
    """One keep-alive connection; one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ready to send requests."""
        self._transport = cast(asyncio.Transport, transport)
        self._answer: asyncio.Future[tuple[int, float | None]] | None = None
        self.is_open = True

    def send(self, request: bytes) -> asyncio.Future[tuple[int, float | None]]:
        """Send a request; its status and Retry-After when the answer is whole."""
        self._received = b""
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        """Wait for as many bytes as the head announces."""
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator or self._answer is None:
            return
        lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in lines}
        if len(body) >= int(headers.get(b"content-length", b"0")):
            answer, self._answer = self._answer, None
            retry_after = headers.get(b"retry-after")
            answer.set_result((int(head[9:12]), float(retry_after) if retry_after else None))

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends before its answer is a failure."""
        self.is_open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((0, None))

    def close(self) -> None:
        """End it."""
        self._transport.close()


class Client:
    """Client of one model, with as many connections as concurrent requests."""

    def __init__(self, url: str, model: str, prompt: str) -> None:
        self._parts = urlsplit(url)
        self._idle: list[Connection] = []
        self._model, self._prompt = model, prompt

    def request(self, tokens: int, timeout_s: float | None) -> bytes:
        """The bytes of a request for an answer of so many tokens, whole within a time."""
        body: dict[str, Any] = {"model": self._model, "prompt": self._prompt, "max_tokens": tokens}
        body |= {"ignore_eos": True, "temperature": 0.0} | ({"timeout": timeout_s} if timeout_s else {})
        raw = json.dumps(body).encode()
        path = f"{self._parts.path}/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: {self._parts.netloc}\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw

    async def send(self, scheduled_at: float, tokens: int, timeout_s: float | None = None) -> Answer:
        """Send one request; returns its result."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                break
        else:
            loop = asyncio.get_running_loop()
            _, connection = await loop.create_connection(
                Connection, str(self._parts.hostname), int(self._parts.port or 80)
            )
        status, retry_after = await connection.send(self.request(tokens, timeout_s))
        if connection.is_open:
            self._idle.append(connection)
        return Answer(scheduled_at, time.perf_counter(), status, retry_after, tokens)

    def close(self) -> None:
        """End all connections."""
        for connection in self._idle:
            connection.close()


async def closed_loop(client: Client, streams: int, seconds: float) -> dict[str, Any]:
    """Capacity: requests/s and latency of `streams` clients that each send one request after the other."""
    start_time = time.perf_counter()
    warm_until, until = start_time + seconds / 4, start_time + seconds
    answers: list[Answer] = []

    async def run_stream(dice: random.Random) -> None:
        while (now := time.perf_counter()) < until:
            answers.append(await client.send(now, dice.choice(LENGTHS)))

    await asyncio.gather(*(run_stream(random.Random(number)) for number in range(streams)))
    measured = [a for a in answers if warm_until <= a.ended_at < until]
    succeeded = [a for a in measured if a.status == 200]
    return {
        "requests_per_s": len(succeeded) / (until - warm_until),
        "tokens_per_s": sum(a.tokens for a in succeeded) / (until - warm_until),
        "latency_s": statistics.median(a.ended_at - a.scheduled_at for a in succeeded) if succeeded else float("inf"),
        "failed": sorted({a.status for a in measured} - {200}),
    }


async def open_loop(client: Client, rate: float, seconds: float, timeout_s: float, seed: int) -> dict[str, Any]:
    """Goodput of `rate` requests/s with a deadline. Answers of the first quarter are not counted: queues still grow then."""
    dice = random.Random(seed)
    start_time = time.perf_counter()
    warm_until, until = start_time + seconds / 4, start_time + seconds
    tasks = []
    scheduled_at = start_time
    while (scheduled_at := scheduled_at + dice.expovariate(rate)) < until:
        if (pause_s := scheduled_at - time.perf_counter()) > 0:
            await asyncio.sleep(pause_s)
        tasks.append(asyncio.create_task(client.send(scheduled_at, dice.choice(LENGTHS), timeout_s)))
    answers = [a for a in await asyncio.gather(*tasks) if warm_until <= a.ended_at < until]
    in_time = [a for a in answers if a.status == 200 and a.ended_at - a.scheduled_at <= timeout_s]
    latencies = sorted(a.ended_at - a.scheduled_at for a in in_time)
    late = sum(a.status == 200 for a in answers) - len(latencies)
    waits = [a.retry_after for a in answers if a.retry_after is not None]
    counts = Counter(a.status for a in answers)
    return {
        "offered_per_s": rate,
        "goodput_per_s": len(latencies) / (until - warm_until),
        "good_tokens_per_s": sum(a.tokens for a in in_time) / (until - warm_until),
        "late": late,
        "refused_429": counts.pop(429, 0),
        "expired_504": counts.pop(504, 0),
        "failed": {str(status): count for status, count in counts.items() if status != 200},
        "p50_s": statistics.median(latencies) if latencies else float("inf"),
        "p99_s": latencies[int(0.99 * (len(latencies) - 1))] if latencies else float("inf"),
        "retry_after_s": statistics.median(waits) if waits else None,
    }
