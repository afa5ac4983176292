"""Many prompts at once, by the `openai` SDK; the answers come in the order of the prompts.

tandem slurm tunnel 1234            # or `tandem serve up`; prints the address and the key
OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=tdm-... python examples/openai_many_prompts.py
"""

from __future__ import annotations

import asyncio

from openai import AsyncOpenAI

PROMPTS = [f"import {module}" for module in ("os", "sys", "json", "re", "math", "time", "csv", "socket")]
MOST_AT_ONCE = 4
"""Requests that are open at once."""


async def main() -> None:
    """Complete all prompts with the first model that is served, and print one line for each."""
    async with AsyncOpenAI() as client:
        model = (await client.models.list()).data[0].id
        turns = asyncio.Semaphore(MOST_AT_ONCE)

        async def complete(prompt: str) -> str:
            async with turns:
                answer = await client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0)
            return answer.choices[0].text

        for prompt, text in zip(PROMPTS, await asyncio.gather(*map(complete, PROMPTS)), strict=True):
            print(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    asyncio.run(main())
