"""Token counts of beam searches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tandem.engine.usage import TokenCounts, counting_tokens, current_tokens
from tandem.engine.vllm.beam_search import count_beams

PROMPT = [1, 2, 3]


@dataclass
class Beam:
    token_ids: list[int]
    finish_reason: str = "length"


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Beam]


@dataclass
class Serving:
    """As vLLM's: each step of each beam is a request of its own, whose prompt is all that the beam has."""

    width: int
    steps: int
    finish_reason: str = "length"
    stops_after: int = 10**9
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    counters: int = 0

    async def _step(self, prompt: list[int]) -> None:
        tokens = current_tokens()
        assert tokens is not None
        generated: list[int] = []
        tokens.add(f"r{self.counters}", lambda: TokenCounts(len(prompt) if generated else 0, len(generated)))
        self.counters += 1
        await asyncio.sleep(0)
        generated.append(7)

    async def beam_search(self, prompt: list[int]) -> AsyncIterator[Output]:
        beams = [list(prompt)]
        for number in range(self.steps):
            if number == self.stops_after:
                self.reached.set()
                await asyncio.sleep(60)
            await asyncio.gather(*(asyncio.create_task(self._step(beam)) for beam in beams))
            beams = [[*beams[0], 7] for _ in range(self.width)]
        yield Output(prompt, [Beam(beam[len(prompt) :], self.finish_reason) for beam in beams])


async def test_a_beam_search_counts_its_prompt_once_and_the_tokens_of_its_answer():
    serving = Serving(width=4, steps=5)
    count_beams(serving)
    with counting_tokens() as tokens:
        outputs = [output async for output in serving.beam_search(PROMPT)]
    assert serving.counters == 1 + 4 * 4 and len(outputs) == 1
    assert tokens.now == TokenCounts(3, 4 * 5)


async def test_prompts_of_one_request_count_each():
    serving = Serving(width=2, steps=3)
    count_beams(serving)
    with counting_tokens() as tokens:
        for prompt in (PROMPT, PROMPT, [9]):
            _ = [output async for output in serving.beam_search(prompt)]
    assert tokens.now == TokenCounts(3 + 3 + 1, 3 * 2 * 3)


async def test_a_beam_search_that_is_left_counts_its_prompt_once_and_its_steps():
    serving = Serving(width=4, steps=9, stops_after=3)
    count_beams(serving)

    async def ask() -> None:
        _ = [output async for output in serving.beam_search(PROMPT)]

    with counting_tokens() as tokens:
        asking = asyncio.create_task(ask())
        await serving.reached.wait()
        asking.cancel()
        await asyncio.wait([asking])
    assert tokens.now == TokenCounts(3, 1 + 4 + 4)


async def test_a_beam_search_that_fails_counts_its_steps():
    serving = Serving(width=2, steps=2, finish_reason="error")
    count_beams(serving)
    with counting_tokens() as tokens:
        _ = [output async for output in serving.beam_search(PROMPT)]
    assert tokens.now == TokenCounts(3, 1 + 2)


async def test_without_counts_it_passes():
    class Plain:
        async def beam_search(self, prompt: list[int]) -> AsyncIterator[Output]:
            yield Output(prompt, [])

    serving = Plain()
    count_beams(serving)
    assert [output.prompt_token_ids async for output in serving.beam_search(PROMPT)] == [PROMPT]
