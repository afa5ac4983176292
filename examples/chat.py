"""A conversation of two questions, by Tandem's client.

python examples/chat.py             # the app at TANDEM_API_URL, or of this TANDEM_HOME
python examples/chat.py 1234        # the app of a Slurm job, through ssh where need be
"""

from __future__ import annotations

import sys

import tandem

QUESTIONS = ("What does os.path.join do?", "And with an absolute second part?")


def main(job: str | None = None) -> None:
    """Ask the questions of the only model that is served, each with all that was said before it."""
    with tandem.Client() if job is None else tandem.Client.from_slurm(job) as client:
        messages: list[dict[str, str]] = []
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            answer = client.chat(messages, max_tokens=64)
            messages.append({"role": "assistant", "content": answer})
            print(f"> {question}\n{answer}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
