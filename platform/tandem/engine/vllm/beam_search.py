"""Token counts of vLLM's beam search, as the `usage` of its answer has them.

vLLM's beam search (`vllm/entrypoints/generate/beam_search/online.py`) asks the engine anew for each token of each beam, with the
prompt and what the beam has so far as the prompt. Counted one by one, these requests would be charged the prompt once for each
step and beam.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from tandem.engine.usage import RequestTokens, TokenCounts, counting_tokens, current_tokens


class StepTokens(RequestTokens):
    """The counts of a beam search that has not ended: its prompt once, and the tokens of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self._ended_counts = TokenCounts()
        self._running_counters: list[Callable[[], TokenCounts]] = []

    def add(self, prompt_id: str, counter: Callable[[], TokenCounts]) -> None:
        """Add one beam's step. Ended steps are summed up and dropped, as each holds a whole prompt."""
        self._ended_counts, self._running_counters = (
            self._sum(),
            [step_counter for step_counter in self._running_counters if not step_counter().completion],
        )
        self._running_counters.append(counter)

    @property
    def now(self) -> TokenCounts:
        """The counts so far."""
        return self._sum(running=True)

    def _sum(self, *, running: bool = False) -> TokenCounts:
        prompt, completion = self._ended_counts
        for counts in [counter() for counter in self._running_counters]:
            if counts.completion or running:
                # The first step has the shortest prompt: the client's.
                prompt = min(prompt, counts.prompt) if prompt and counts.prompt else prompt or counts.prompt
                completion += counts.completion
        return TokenCounts(prompt, completion)


def count_beams(serving: Any) -> None:
    """Let `beam_search` of a vLLM serving object add its counts to the HTTP request that it is a part of."""
    search = serving.beam_search

    async def counting_search(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        request = current_tokens()
        if request is None:
            async for output in search(*args, **kwargs):
                yield output
            return
        steps = StepTokens()
        final_counts: list[TokenCounts] = []
        request.add(f"beams-{uuid.uuid4().hex}", lambda: final_counts[-1] if final_counts else steps.now)
        # It yields once, at its end.
        with counting_tokens(steps):
            outputs = [output async for output in search(*args, **kwargs)]
        for output in outputs:
            if all(beam.finish_reason != "error" for beam in output.outputs):
                final_counts.append(_usage(output))
            yield output

    serving.beam_search = counting_search


def _usage(output: Any) -> TokenCounts:
    """As vLLM computes the `usage` of an answer."""
    return TokenCounts(len(output.prompt_token_ids), sum(len(beam.token_ids) for beam in output.outputs))
