"""Runs the worlds of resume_world.py, and compares a run that went on in another layout with one that was not interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tandem.settings import child_environment

Way = tuple[str, str, int, str, int]
"""A model, the layout that saves and its workers, the layout that goes on and its workers."""


def run_worlds(folder: Path, ways: tuple[Way, ...], place: str = "") -> dict[str, Any]:
    """What the runs of a set of ways told. Worlds that save come before those that go on; `place`: for checkpoints."""
    saves = sorted({(model, first, workers) for model, first, workers, _, _ in ways})
    alone = [["whole", model, "fsdp2", ""] for model in sorted({way[0] for way in ways})]
    sizes = sorted({way[2] for way in ways} | {way[4] for way in ways})
    worlds: list[tuple[int, list[Any]]] = []
    for position, size in enumerate(sizes):
        tasks = alone if not position else []
        tasks = [*tasks, *(["save", model, layout, ""] for model, layout, workers in saves if workers == size)]
        worlds.append((size, [*tasks, *(task(way) for way in ways if way[4] == size and way[2] <= size)]))
    worlds += [
        (size, later) for size in sizes if (later := [task(way) for way in ways if way[4] == size and way[2] > size])
    ]
    found: dict[str, Any] = {}
    for number, (size, tasks) in enumerate(worlds):
        found |= run_world(folder, number, size, tasks, place or str(folder))
    return found


def task(way: Way) -> list[str]:
    model, first, workers, second, _ = way
    return ["resume", model, second, f"{model} {first} {workers}"]


def run_world(folder: Path, number: int, size: int, tasks: list[Any], place: str) -> dict[str, Any]:
    (folder / f"world-{number}.json").write_text(json.dumps(tasks))
    logs = [folder / f"log-{number}-{rank}" for rank in range(size)]
    running = []
    for rank, log in enumerate(logs):
        script = str(Path(__file__).with_name("resume_world.py"))
        with log.open("w") as said:
            running.append(
                subprocess.Popen(
                    [sys.executable, script, str(folder), str(rank), str(size), str(number), place],
                    env=child_environment({"OMP_NUM_THREADS": "1"}), stdout=said, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        for process, log in zip(running, logs, strict=True):
            assert process.wait(timeout=500) == 0, log.read_text()[-3000:]
    finally:
        for process in running:
            process.kill()
    return {
        f"{key} on {size}": value for key, value in json.loads((folder / f"told-{number}.json").read_text()).items()
    }


def check(parity: Any, found: dict[str, Any], way: Way) -> None:
    """What the run measured after it went on is what the undisturbed one did."""
    model, first, workers, second, others = way
    resumed = found[f"resume {model} {model} {first} {workers} {second} on {others}"]
    (undisturbed,) = (value for key, value in found.items() if key.startswith(f"whole {model}  fsdp2 on"))
    left = parity.STEPS - parity.SAVED
    for key in ("losses", "norms", "rates"):
        assert parity.difference(undisturbed[key][-left:], resumed[key]) <= 1e-5, key
    for key in ("evaluation", "average") if "average" in resumed else ("evaluation",):
        assert parity.difference(undisturbed[key], resumed[key]) <= 1e-5, key
    # What is trained, and averaged, has moved since: the numbers tell runs apart.
    assert parity.difference(undisturbed["losses"][:left], resumed["losses"]) > 1e-3
    assert ("average" in resumed) == (not first.startswith("zero") and not second.startswith("zero"))
