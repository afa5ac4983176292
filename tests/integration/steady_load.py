"""Eight streams that never pause, each checked to its last byte: what a change of what is served must not touch."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from typing import Any, Self

import aiohttp

STREAMS = 8
WORDS = tuple(f"word{number}" for number in range(400))
STALLED_S = 60.0


class SteadyLoad:
    """Streams of an echo model, as a context manager: `failed` is what went wrong, `answered` how many ended well, by model id.

    Half of the streams are of `words` words, the others of as many again and again longer, so that some are under way whatever
    happens when. `whole` says whether a text is the right one; an echo's is the prompt.
    """

    def __init__(self, url: str, model: str, *, words: int = 20, tokens: dict[str, Any] | None = None) -> None:
        self._url = url
        self._model = model
        self._words = words
        self._tokens = tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._began: list[float] = []
        self.failed: list[str] = []
        self.answered: Counter[str] = Counter()
        self.texts: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Begin nothing new, and wait until all that has begun has ended."""
        self._stop.set()
        self._thread.join(STALLED_S)
        assert not self._thread.is_alive(), "a stream did not end"

    def wait_for(self, answers: int, model: str | None = None) -> None:
        """Until so many more streams (of one model id) have ended well."""
        counted = self._count(model) + answers
        deadline = time.monotonic() + STALLED_S
        while self._count(model) < counted:
            assert time.monotonic() < deadline, f"{self.answered}, {self.failed}"
            time.sleep(0.05)

    def _count(self, model: str | None) -> int:
        return self.answered.total() if model is None else self.answered[model]

    async def _run(self) -> None:
        # Each request on a connection of its own, as if from so many clients.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=STALLED_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._stream(session, number) for number in range(STREAMS)))

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> None:
        words = WORDS[: self._words * (1 if number % 2 else 1 + number)]
        while not self._stop.is_set():
            try:
                await self._ask(session, number, " ".join(words))
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
                self.failed.append(repr(error))
                await asyncio.sleep(0.2)

    async def _ask(self, session: aiohttp.ClientSession, number: int, prompt: str) -> None:
        body = {"model": self._model, "prompt": prompt, "stream": True, **(self._tokens or {})}
        text, model, ended = "", "", False
        async with session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise ValueError(f"{answer.status}: {(await answer.text())[:300]}")
            async for line in answer.content:
                data = line.strip().removeprefix(b"data: ")
                if data == b"[DONE]":
                    ended = True
                elif data:
                    event = json.loads(data)
                    text += event["choices"][0]["text"]
                    model = event["model"]
        # A greedy model says the same to the same prompt every time; an echo says the prompt.
        right = prompt if self._tokens is None else self.texts.setdefault(f"{model} {number}", text)
        if not ended or text != right:
            raise ValueError(f"a stream of {model} ended after {len(text)} of {len(right)} characters")
        self.answered[model] += 1
