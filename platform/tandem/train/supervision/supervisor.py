"""Keeps a job's driver going: `python -m tandem.train.supervision.supervisor JOB_DIR`, which is what a Ray job runs.

The driver is a child of this small process, which has nothing to lose: a driver that is killed, say by a kernel without memory,
is started again and goes on from the newest checkpoint; one that ends by itself ends the job. If this process is killed, the
driver notices, saves what it has, and leaves; who follows the job submits it again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tandem.checkpoint import folders
from tandem.config import TrainConfig, load_yaml
from tandem.errors import TandemError
from tandem.observability.journal import Journal

SUPERVISED_FLAG = "--supervised"
"""Tells the driver that its input ends when its supervisor does."""


def main(arguments: list[str]) -> int:
    """Run the driver of the job in the folder named by the only argument, until it ends by itself; returns its exit status."""
    if len(arguments) != 1:
        print("usage: python -m tandem.train.supervision.supervisor JOB_DIR", file=sys.stderr)
        return 2
    job = Path(arguments[0]).expanduser().resolve()
    journal = Journal(job / "events.jsonl")
    told: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: object) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    failures, kept = 0, -1
    while True:
        child = subprocess.Popen(
            [sys.executable, "-m", "tandem.train.launch", str(job), SUPERVISED_FLAG], stdin=subprocess.PIPE
        )
        status = child.wait()
        if status >= 0 or told:
            return status if status >= 0 else 128 - status
        name = signal.Signals(-status).name
        step = newest_step(job)
        failures = 1 if step > kept else failures + 1
        kept = step
        journal.write(
            {
                "event": "fault",
                "kind": "driver",
                "rank": None,
                "reason": f"the driver was ended by {name}",
                "step": step,
            }
        )
        if failures > limit(job):
            journal.write(
                {
                    "event": "failed",
                    "error": f"The driver was ended {failures} times without a new checkpoint in between, the last time by "
                    f"{name}. Run the same command again to go on from step {step}.",
                }
            )
            return 1


def newest_step(job: Path) -> int:
    """The step of a job's newest checkpoint; 0 without one."""
    try:
        found = folders.latest(folders.checkpoints_root(load_yaml(TrainConfig, job / "config.yaml").checkpoint, job))
    except Exception:  # noqa: BLE001 - a store that does not answer; the driver will say so
        return 0
    return folders.step_of(found) if found else 0


def limit(job: Path) -> int:
    """How often in a row a job may start again."""
    try:
        return load_yaml(TrainConfig, job / "config.yaml").checkpoint.max_failures
    except TandemError:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
