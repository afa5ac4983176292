"""A load generator for completions, streamed or whole, that costs little: raw sockets, bytes counted and not parsed.

    python -m bench.harness.load http://127.0.0.1:8000 --model tiny --streams 16 --tokens 128 --requests 4 [--whole]

Each stream is one connection that sends its requests one after the other. Prints JSON: tokens/s, time to first token,
time between tokens, and the generator's own share of one CPU and of the time that it waited for one, so that it can be
seen not to be the bottleneck.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import uvloop

PROMPT = "import os\n\ndef main(path):\n    return os.path.join(path"


@dataclass(slots=True)
class Tally:
    """Measurements of one stream, in seconds."""

    first: list[float] = field(default_factory=list)
    """From sending a request to its first token."""
    between: list[float] = field(default_factory=list)
    """Mean gap between the tokens of a request."""
    events: int = 0
    failed: list[str] = field(default_factory=list)


class Stream(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self, request: bytes, tokens: int, count: int, tally: Tally) -> None:
        self._request = request
        self._tokens = tokens
        self._requests_left = count
        self._tally = tally
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with the first request."""
        # uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._first_at = 0.0
        self._buffer = b""
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count events; the last of a request says [DONE]."""
        now = time.perf_counter()
        if not self._first_at:
            # The head may come alone, ahead of the first token.
            self._buffer += data
            if len(self._buffer) >= 12 and not self._buffer.startswith(b"HTTP/1.1 200"):
                self._fail(self._buffer[:300].decode(errors="replace"))
            if b"data: " not in self._buffer:
                return
            self._first_at = self._last_at = now
            self._tally.first.append(now - self._sent_at)
            data, self._buffer = self._buffer, b""
        self._tally.events += data.count(b"data: ")
        ending = self._buffer[-32:] + data
        # The chunk that ends the response follows [DONE], in the same read or in the next.
        if ending.endswith(b"0\r\n\r\n") and b"[DONE]" in ending[-64:]:
            self._tally.between.append((self._last_at - self._first_at) / max(1, self._tokens - 1))
            self._requests_left -= 1
            if self._requests_left:
                self._send()
            else:
                self._transport.close()
                self.done.set_result(None)
            return
        if not data.startswith(b"0\r\n"):
            self._last_at = now
        self._buffer = ending[-64:]

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends before its requests do is a failure."""
        if not self.done.done():
            self._fail(f"connection lost: {error}")

    def _fail(self, reason: str) -> None:
        self._tally.failed.append(reason)
        self._transport.close()
        if not self.done.done():
            self.done.set_result(None)


class Whole(Stream):
    """The same for answers that come in one piece: their first token is their last."""

    def data_received(self, data: bytes) -> None:
        """Wait for as many bytes as the head announces."""
        self._buffer += data
        head, separator, body = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = next(
            (v for k, _, v in (x.partition(b":") for x in head.split(b"\r\n")) if k.lower() == b"content-length"), b"0"
        )
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(self._buffer[:300].decode(errors="replace"))
        elif len(body) >= int(length):
            self._tally.first.append(time.perf_counter() - self._sent_at)
            self._tally.between.append(self._tally.first[-1] / self._tokens)
            self._requests_left -= 1
            if self._requests_left:
                self._send()
            else:
                self._transport.close()
                self.done.set_result(None)


async def drive(
    url: str, model: str, streams: int, tokens: int, requests: int, *, whole: bool = False, prompt: str, key: str
) -> dict[str, object]:
    """Run the load; returns the figures that the module's docstring lists."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": not whole,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    request = head.encode() + body
    stream_class = Whole if whole else Stream
    tallies = [Tally() for _ in range(streams)]
    loop = asyncio.get_running_loop()
    started, cpu, waited = time.perf_counter(), time.process_time(), run_queue_s()

    def open_stream(tally: Tally) -> Stream:
        return stream_class(request, tokens, requests, tally)

    connections = [
        (await loop.create_connection(functools.partial(open_stream, tally), str(host), int(port or 80)))[1]
        for tally in tallies
    ]
    await asyncio.gather(*(connection.done for connection in connections))
    wall, cpu, waited = time.perf_counter() - started, time.process_time() - cpu, run_queue_s() - waited
    failed = [reason for tally in tallies for reason in tally.failed]
    finished = sum(len(tally.between) for tally in tallies)
    first = [seconds for tally in tallies for seconds in tally.first] or [0.0]
    return {
        "streams": streams,
        "whole": whole,
        "tokens_per_s": finished * tokens / wall,
        "first_token_ms": 1000 * statistics.median(first),
        "first_token_p95_ms": 1000 * sorted(first)[int(0.95 * (len(first) - 1))],
        "between_tokens_ms": 1000 * statistics.median([s for t in tallies for s in t.between] or [0.0]),
        "requests": finished,
        "events": sum(t.events for t in tallies),
        "seconds": wall,
        "generator_cpu": cpu / wall,
        "generator_waited": waited / wall,
        "failed": failed[:3],
    }


def run_queue_s() -> float:
    """Seconds that this thread was ready to run and had no core, as Linux counts them; 0 elsewhere."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def main() -> None:
    """Parse the arguments, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, default=4, help="requests of each stream, one after the other")
    parser.add_argument("--whole", action="store_true", help="answers in one piece")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--key", default="none", help="API key")
    options = parser.parse_args()
    load = drive(
        options.url,
        options.model,
        options.streams,
        options.tokens,
        options.requests,
        whole=options.whole,
        prompt=options.prompt,
        key=options.key,
    )
    print(json.dumps(uvloop.run(load)))


if __name__ == "__main__":
    main()
