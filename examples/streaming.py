"""An answer that is printed as it comes, by Tandem's client.

python examples/streaming.py        # the app at TANDEM_API_URL, or of this TANDEM_HOME
python examples/streaming.py 1234   # the app of a Slurm job, through ssh where need be
"""

from __future__ import annotations

import sys

import tandem


def main(job: str | None = None) -> None:
    """Print the pieces of one answer."""
    with tandem.Client() if job is None else tandem.Client.from_slurm(job) as client:
        for piece in client.stream("What does os.path.join do?", max_tokens=64):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
