"""Many prompts at once, by Tandem's client; the answers come in the order of the prompts.

python examples/many_prompts.py        # the app at TANDEM_API_URL, or of this TANDEM_HOME
python examples/many_prompts.py 1234   # the app of a Slurm job, through ssh where need be
"""

from __future__ import annotations

import sys

import tandem

PROMPTS = [f"import {module}" for module in ("os", "sys", "json", "re", "math", "time", "csv", "socket")]


def main(job: str | None = None) -> None:
    """Complete all prompts, and print one line for each."""
    with tandem.Client() if job is None else tandem.Client.from_slurm(job) as client:
        outputs = client.generate(PROMPTS, tandem.SamplingParams(temperature=0, max_tokens=16))
        for output in outputs:
            print(f"{output.prompt!r} -> {output['text']!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
