"""Training jobs with real processes, for tests that disturb them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tandem.observability import codec
from tandem.settings import child_environment

MODEL = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48, "max_length": 64,
}  # fmt: skip


def write_job(home: Path, name: str, **changes: Any) -> Path:
    """The folder of a small pretraining job on the dataset `text` of `home`; as it is, if it is there."""
    job = home / "jobs" / name
    if not (job / "config.yaml").exists():
        config = {
            "name": name, "data": {"path": str(home / "data" / "text"), "sequence_length": 32}, "model": MODEL,
            "parallel": {"workers": 2}, "steps": 10, "batch_size": 4, "checkpoint": {"every_steps": 5},
            "optimizer": {"learning_rate": 0.01}, "register": False, **changes,
        }  # fmt: skip
        job.mkdir(parents=True, exist_ok=True)
        (job / "config.yaml").write_text(yaml.safe_dump(config))
    return job


def losses(job: Path) -> dict[int, float]:
    """The loss of each step; of a repeated step, the last."""
    return {e["step"]: e["loss"] for e in codec.read(job / "events.jsonl") if e["event"] == "step"}


class Driver:
    """One run of a job's driver."""

    def __init__(self, job: Path, home: Path, address: str, *, module: str = "tandem.train.launch") -> None:
        self.job = job
        self.lines: list[str] = []
        variables = {"TANDEM_HOME": str(home), "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(job)],
            env=child_environment(variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def events(self) -> Iterator[dict[str, Any]]:
        """Events as they are printed."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)
            if event := codec.decode(line):
                yield event

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event from now on that is wanted."""
        for event in self.events():
            if wanted(event):
                return event
        raise AssertionError("".join(self.lines[-60:]))

    def wait_for_step(self, step: int) -> None:
        """Return when the run has come so far."""
        self.wait_for(lambda e: e["event"] == "step" and e["step"] >= step)

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Exit status and the events that were left."""
        left = list(self.events())
        return self.process.wait(timeout=60), left

    def kill(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()

    def end_abruptly(self) -> None:
        """Kill it, and give the cluster a moment to notice."""
        self.process.kill()
        self.process.wait()
        time.sleep(1)
