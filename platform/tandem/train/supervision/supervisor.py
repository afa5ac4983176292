"""Supervisor of a job's driver: `python -m tandem.train.supervision.supervisor JOB_DIR`, the entry point of a Ray job.

The driver is a child of this small process, which holds no state. A driver that a signal kills, such as the kernel's when memory
is short, is started again and continues from the newest checkpoint; a driver that exits by itself ends the job. If this process
is killed, the driver notices, saves a checkpoint and exits; the client that follows the job submits it again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tandem.checkpoint import folders
from tandem.config import TrainConfig, load_yaml
from tandem.errors import TandemError
from tandem.observability.events import Failed, FaultDetected
from tandem.observability.journal import Journal

SUPERVISED_FLAG = "--supervised"
"""Argument of a driver whose standard input closes when its supervisor ends."""


def main(arguments: list[str]) -> int:
    """Run the driver of the job in the folder that the only argument names, until it exits by itself; returns its status."""
    if len(arguments) != 1:
        print("usage: python -m tandem.train.supervision.supervisor JOB_DIR", file=sys.stderr)
        return 2
    job = Path(arguments[0]).expanduser().resolve()
    journal = Journal(job / "events.jsonl")
    received_signals: list[int] = []
    driver: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        received_signals.append(number)
        if driver is not None:
            driver.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    failures, failed_at_step = 0, -1
    while True:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tandem.train.launch", str(job), SUPERVISED_FLAG], stdin=subprocess.PIPE
        )
        status = driver.wait()
        if status >= 0 or received_signals:
            return status if status >= 0 else 128 - status
        name = signal.Signals(-status).name
        step = newest_step(job)
        failures = 1 if step > failed_at_step else failures + 1
        failed_at_step = step
        journal.write(FaultDetected(kind="driver", reason=f"the driver was ended by {name}", step=step))
        if failures > max_failures(job):
            journal.write(
                Failed(
                    error=f"The driver was ended {failures} times without a new checkpoint in between, the last time by "
                    f"{name}. Run the same command again to resume from step {step}."
                )
            )
            return 1


def newest_step(job: Path) -> int:
    """The step of a job's newest checkpoint; 0 without one."""
    try:
        checkpoint = folders.latest(
            folders.checkpoints_root(load_yaml(TrainConfig, job / "config.yaml").checkpoint, job)
        )
    except Exception:  # noqa: BLE001 - the driver reports storage that does not answer
        return 0
    return folders.step_of(checkpoint) if checkpoint else 0


def max_failures(job: Path) -> int:
    """Restarts in a row without a new checkpoint that the job's config allows; 0 without a readable config."""
    try:
        return load_yaml(TrainConfig, job / "config.yaml").checkpoint.max_failures
    except TandemError:
        return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
