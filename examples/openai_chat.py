"""A conversation of two questions, by the `openai` SDK.

tandem slurm tunnel 1234            # or `tandem serve up`; prints the address and the key
OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=tdm-... python examples/openai_chat.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openai import OpenAI

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionMessageParam

QUESTIONS = ("What does os.path.join do?", "And with an absolute second part?")


def main() -> None:
    """Ask the questions of the first model that is served, each with all that was said before it."""
    client = OpenAI()
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=64)
        text = answer.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": text})
        print(f"> {question}\n{text}\n")


if __name__ == "__main__":
    main()
