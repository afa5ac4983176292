"""Hostile and careless clients for `bench.serving.hostile`: each attack in a process of its own, held to a share of one core.

    python -m bench.serving.hostile_attacks URL SECONDS ATTACK [ATTACK ...]

Prints the attempts and the statuses of the answers as JSON. Attempts repeat until the time is over; a connection that an attack
keeps open is opened again when the server closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import json
import random
import string
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

SHARE = 0.2
"""Of one core, for all attacks of a process together."""
MIB = 2**20
CONNECTIONS = 64
"""Connections of an attack that holds them open."""
MODEL = "bench"


class Attacker:
    """Connections to one server, statuses of its answers, and the share of a core that they may take."""

    def __init__(self, url: str, seconds: float) -> None:
        parts = urlsplit(url)
        self.host, self.port = str(parts.hostname), int(parts.port or 80)
        self.until = time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self._started_at, self._cpu = time.monotonic(), time.process_time()

    @property
    def over(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.until

    async def rest(self) -> None:
        """Wait until this process has had no more than SHARE of a core."""
        used = time.process_time() - self._cpu
        await asyncio.sleep(max(0.0, used / SHARE - (time.monotonic() - self._started_at)))

    async def post(self, body: bytes, path: str = "/v1/completions", **headers: str) -> None:
        """One request on a connection of its own, whose answer is read to its end or for 20 s."""
        await self.send(request(body, path, **headers))

    async def send(self, raw: bytes, *, read_s: float = 20.0) -> None:
        """Write bytes and count the statuses of the answers."""
        status = "none"
        writer = None
        try:
            async with asyncio.timeout(read_s):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                writer.write(raw)
                line = await reader.readline()
                status = line.split()[1].decode() if len(line.split()) > 1 else "closed"
                while await reader.read(65_536):
                    pass
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if writer is not None:
                writer.close()
        self.statuses[status] += 1
        await self.rest()

    async def hold(self, raw: bytes, data: bytes = b"", every_s: float = 1.0) -> None:
        """Write bytes, read nothing, write `data` now and then; until the server closes the connection or the time is over."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(self.host, self.port, limit=1024)
            writer.write(raw)
            while not self.over and not writer.is_closing():
                await asyncio.sleep(min(every_s, max(0.0, self.until - time.monotonic())))
                writer.write(data)
                await self.rest()
            writer.transport.abort()
        self.statuses["held"] += 1


def request(body: bytes, path: str = "/v1/completions", **headers: str) -> bytes:
    """The bytes of a POST whose connection closes with the answer."""
    all_headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    all_headers |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{head}\r\n".encode() + body


def completion(**fields: Any) -> bytes:
    """The body of a completion."""
    return json.dumps({"model": MODEL, "prompt": "x", **fields}).encode()


def word(length: int = 30) -> str:
    """A model name that does not exist."""
    return "".join(random.choices(string.ascii_lowercase, k=length))


EMPTY_OBJECTS = b'{"model":"bench","prompt":[' + b"{}," * (2 * MIB // 3 - 20) + b"{}]}"
"""A body of 2 MiB that takes a parser a second and 60 MB."""
DEEP = b'{"model":"bench","prompt":' + b"[" * 900_000 + b"]" * 900_000 + b"}"
LARGE = completion(user="x" * (2 * MIB - 200), max_tokens=1)
GZIP = gzip.compress(b"0" * (16 * MIB))
SMUGGLED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 3\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
)
SCHEMA_TEXT = completion(structured_outputs={"json": "[" + "{}," * 600_000 + "{}]"})
LONG_PATHS = completion(documents={"k" * 10_000: [{}] * 20_000})
UNREAD = completion(prompt="x" * 4096, stream=True, ignore_eos=True, max_tokens=8192)


def branching(levels: int = 50) -> dict[str, Any]:
    """A schema each of whose parts refers to the next one twice, and whose last one refers to itself."""
    parts = {f"n{i}": {"anyOf": [{"$ref": f"#/$defs/n{min(i + 1, levels - 1)}"}] * 2} for i in range(levels)}
    return {"$ref": "#/$defs/n0", "$defs": parts}


BRANCHING = completion(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": branching()}})


def repeated(
    attempt: Callable[[Attacker], Awaitable[None]], side_by_side: int = 8
) -> Callable[[Attacker], Awaitable[None]]:
    """An attack that repeats one attempt on some connections."""

    async def attack(attacker: Attacker) -> None:
        async def repeat() -> None:
            while not attacker.over:
                await attempt(attacker)

        await asyncio.gather(*(repeat() for _ in range(side_by_side)))

    return attack


async def leave(attacker: Attacker) -> None:
    """Ask for a long stream and go."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection(attacker.host, attacker.port)
        writer.write(request(completion(prompt="word " * 500, stream=True)))
        await asyncio.sleep(0.05)
        writer.transport.abort()
    attacker.statuses["left"] += 1
    await attacker.rest()


def trickle(number: Iterator[int]) -> bytes:
    """One more header of a head that never ends."""
    return f"x-{next(number)}: a\r\n".encode()


ATTACKS: dict[str, Callable[[Attacker], Awaitable[None]]] = {
    "empty objects": repeated(lambda a: a.post(EMPTY_OBJECTS), 4),
    "deep JSON": repeated(lambda a: a.post(DEEP), 4),
    "2 MiB bodies": repeated(lambda a: a.post(LARGE), 16),
    "unfinished heads": repeated(
        lambda a: a.hold(b"GET /health HTTP/1.1\r\nhost: localhost\r\n", trickle(itertools.count())), CONNECTIONS
    ),
    "unfinished bodies": repeated(lambda a: a.hold(request(LARGE)[: 2 * MIB - 5000], b"x"), CONNECTIONS),
    "n of 16384": repeated(lambda a: a.post(completion(n=16_384, max_tokens=300))),
    "128 sequences": repeated(lambda a: a.post(completion(prompt=["x"] * 8, n=16, max_tokens=64))),
    "objects of 1 MB in stop": repeated(lambda a: a.post(completion(stop={"a": "x" * MIB}))),
    "10,000 stop texts": repeated(lambda a: a.post(completion(stop=["x" * 10] * 10_000))),
    "branching schemas": repeated(lambda a: a.post(BRANCHING)),
    "1.8 MB of schema as text": repeated(lambda a: a.post(SCHEMA_TEXT), 4),
    "long paths to many entries": repeated(lambda a: a.post(LONG_PATHS), 4),
    "urgent requests": repeated(lambda a: a.post(completion(priority=-1000, max_tokens=64))),
    "unknown names": repeated(
        lambda a: a.post(json.dumps({"model": word(), word(): 1, word(): 2, word(): 3}).encode())
    ),
    "text/plain": repeated(lambda a: a.post(completion(), content_type="text/plain")),
    "gzip bombs": repeated(lambda a: a.post(GZIP, content_encoding="gzip")),
    "two lengths, chunks": repeated(lambda a: a.send(SMUGGLED, read_s=2.0)),
    "large heads": repeated(
        lambda a: a.send(b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000 + b"\r\n\r\n")
    ),
    "lists of models": repeated(
        lambda a: a.send(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    ),
    "media of inner hosts": repeated(
        lambda a: a.post(
            json.dumps(
                {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": [{"image_url": {"url": "http://10.0.0.1/"}}] * 500}],
                }
            ).encode(),
            "/v1/chat/completions",
        )
    ),
    "clients that leave": repeated(leave),
    "clients that do not read": repeated(lambda a: a.hold(request(UNREAD)), 16),
}
"""The attacks by name. Those on an engine's tokenizer, embeddings and adapters need a real one: see the unit tests."""


async def run(url: str, seconds: float, names: list[str]) -> dict[str, Any]:
    """Run attacks concurrently; returns their figures."""
    attacker = Attacker(url, seconds)
    start_time, cpu = time.monotonic(), time.process_time()
    tasks = [asyncio.ensure_future(ATTACKS[name](attacker)) for name in names]
    _, pending = await asyncio.wait(tasks, timeout=seconds + 2.0)
    for task in pending:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    wall = time.monotonic() - start_time
    return {
        "attempts": attacker.statuses.total(),
        "statuses": dict(attacker.statuses),
        "core": (time.process_time() - cpu) / wall,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(sys.argv[1], float(sys.argv[2]), sys.argv[3:]))))
