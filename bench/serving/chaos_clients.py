"""The clients of bench/serving/chaos_serve.py: they send requests without a pause, and check every answer."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field

import aiohttp

CLIENTS = 8
WORDS = 60
"""Tokens of an answer."""
PATIENCE_S = 120.0
"""A request that has no end by then has hung."""


@dataclass(slots=True)
class RequestRecord:
    """One request and its outcome."""

    began: float
    streamed: bool
    ended: float = 0.0
    replica: str = ""
    """Which engine replica answered, by the answer's header."""
    gateway: str = ""
    """Which gateway carried it, by the same."""
    refused: list[tuple[float, int]] = field(default_factory=list)
    """When nothing took it, and with which status (0: no connection): it was sent again."""
    outcome: str = "right"


@dataclass(slots=True)
class Clients:
    """Clients that send requests until `over` is set."""

    url: str
    model: str
    expected: dict[str, str] = field(default_factory=dict)
    requests: list[RequestRecord] = field(default_factory=list)
    over: bool = False

    async def run(self) -> None:
        """All clients."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for prompt in PROMPTS:
                self.expected[prompt] = await self._read_answer(session, prompt, RequestRecord(0.0, False))
            if len(set(self.expected.values())) < len(PROMPTS):
                raise RuntimeError("Two prompts have the same answer: a wrong one could not be told.")
            print("the answers are known", file=sys.stderr, flush=True)
            await asyncio.gather(*(self._send_requests(session, number) for number in range(CLIENTS)))

    async def _send_requests(self, session: aiohttp.ClientSession, number: int) -> None:
        dice = random.Random(number)
        while not self.over:
            record = RequestRecord(time.monotonic(), number % 2 == 0)
            self.requests.append(record)
            prompt = dice.choice(PROMPTS)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    answer = await self._read_answer(session, prompt, record)
                if answer != self.expected[prompt]:
                    record.outcome = f"wrong: {answer[:80]!r}"
            except TimeoutError:
                record.outcome = "hung"
            except (aiohttp.ClientError, OSError, Broken, ValueError, KeyError) as error:
                record.outcome = f"broken: {type(error).__name__}: {error}"[:200]
            record.ended = time.monotonic()

    async def _read_answer(self, session: aiohttp.ClientSession, prompt: str, record: RequestRecord) -> str:
        body = {"model": self.model, "prompt": prompt, "max_tokens": WORDS, "temperature": 0, "ignore_eos": True}
        while True:
            record.replica = record.gateway = ""
            try:
                async with session.post(
                    f"{self.url}/v1/completions", json={**body, "stream": record.streamed}
                ) as answer:
                    record.replica = answer.headers.get("x-tandem-replica", "")
                    record.gateway = answer.headers.get("x-tandem-gateway", "")
                    if answer.status in (429, 503):
                        status, wait_s = answer.status, float(answer.headers["retry-after"])
                    elif answer.status != 200:
                        raise Broken(f"{answer.status}: {(await answer.text())[:150]}")
                    elif record.streamed:
                        return completion_text((await answer.read()).decode())
                    else:
                        return str((await answer.json())["choices"][0]["text"])
            except aiohttp.ClientConnectorError:
                status, wait_s = 0, 0.5
            record.refused.append((time.monotonic(), status))
            await asyncio.sleep(min(wait_s, 1.0))


PROMPTS = tuple(
    f"one two three four {first} {second}" for first in ("five", "six") for second in ("one", "two", "three")
)


class Broken(Exception):
    """An answer that is none."""


def completion_text(stream: str) -> str:
    """The text of a stream of completions; Broken if it does not end as one should."""
    if "data: [DONE]" not in stream:
        raise Broken(f"the stream ends with {stream[-150:]!r}")
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    if any("error" in event for event in events):
        raise Broken(f"the stream ends with {stream[-150:]!r}")
    return "".join(choice["text"] for event in events for choice in event["choices"])
