"""An answer that is printed as it comes, by the `openai` SDK; the server counts the tokens.

tandem slurm tunnel 1234            # or `tandem serve up`; prints the address and the key
OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=tdm-... python examples/openai_streaming.py
"""

from __future__ import annotations

from openai import OpenAI


def main() -> None:
    """Print the pieces of one answer of the first model that is served, and how many tokens it has."""
    client = OpenAI()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What does os.path.join do?"}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
