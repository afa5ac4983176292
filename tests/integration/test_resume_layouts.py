"""A run goes on in any other layout, on fewer workers or more, as if it had never been interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resume_world import load_parity

from tandem.settings import child_environment

parity = load_parity()
Way = tuple[str, str, int, str, int]
"""A model, the layout that saves and its workers, the layout that goes on and its workers."""

SMALL: tuple[Way, ...] = (
    ("llama", "fsdp2", 2, "tp2", 2),
    ("llama", "pp2", 2, "tp2", 2),
    ("llama", "pp2", 2, "fsdp2", 2),
    ("llama", "fsdp2", 2, "pp2", 2),
    ("llama", "tp2", 2, "pp2 zero bubble", 2),
    ("llama", "pp2 zero bubble", 2, "ddp", 2),
    ("llama", "ddp", 2, "pp2 interleaved", 2),
    ("llama", "zero 3", 2, "fsdp2", 2),
    ("llama", "zero 3", 2, "tp2", 2),
    ("llama", "pp2", 2, "zero 1", 2),
    ("moe", "ep2", 2, "fsdp2", 2),
    ("moe", "fsdp2", 2, "ep2", 2),
    ("moe", "tp2", 2, "ep2", 2),
    ("moe", "ep2", 2, "pp2", 2),
    ("moe", "ep2", 2, "zero 3", 2),
    ("llama+lora", "pp2", 2, "tp2", 2),
    ("llama+lora", "tp2", 2, "fsdp2", 2),
)
LARGE: tuple[Way, ...] = (
    ("llama", "tp2", 4, "fsdp2", 4),
    ("llama", "fsdp2", 4, "tp2", 4),
    ("llama", "fsdp2", 4, "fsdp2", 2),
    ("llama", "fsdp2", 2, "replicate", 4),
    ("llama", "tp2", 4, "pp2", 2),
    ("llama", "pp2", 4, "tp2", 2),
    ("llama", "pp2", 4, "fsdp2", 4),
    ("llama", "zero 3", 4, "fsdp2", 2),
    ("llama", "zero 3", 2, "zero 1", 4),
    ("llama untied", "pp2", 4, "cp2", 2),
    ("moe", "tp2 ep2", 4, "fsdp2", 2),
    ("moe", "ep2", 2, "tp2 ep2", 4),
    ("moe", "pp2", 2, "tp2 ep2", 4),
    ("llama+lora", "tp2", 4, "pp2", 2),
)


def name(way: Way) -> str:
    model, first, workers, second, others = way
    return f"{model}: {first} on {workers} to {second} on {others}"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[Way, ...]], dict[str, Any]]:
    """What the runs of a set of ways told; a few worlds for all of them, one after the other."""
    known: dict[tuple[Way, ...], dict[str, Any]] = {}

    def of(ways: tuple[Way, ...]) -> dict[str, Any]:
        if ways not in known:
            known[ways] = run_worlds(tmp_path_factory.mktemp("resume"), ways)
        return known[ways]

    return of


def run_worlds(folder: Path, ways: tuple[Way, ...]) -> dict[str, Any]:
    """Worlds that save come before those that go on from it."""
    saves = sorted({(model, first, workers) for model, first, workers, _, _ in ways})
    alone = [["whole", model, "fsdp2", ""] for model in sorted({way[0] for way in ways})]
    sizes = sorted({way[2] for way in ways} | {way[4] for way in ways})
    worlds: list[tuple[int, list[Any]]] = []
    for place, size in enumerate(sizes):
        tasks = alone if not place else []
        tasks = [*tasks, *(["save", model, layout, ""] for model, layout, workers in saves if workers == size)]
        worlds.append((size, [*tasks, *(task(way) for way in ways if way[4] == size and way[2] <= size)]))
    worlds += [
        (size, later) for size in sizes if (later := [task(way) for way in ways if way[4] == size and way[2] > size])
    ]
    found: dict[str, Any] = {}
    for number, (size, tasks) in enumerate(worlds):
        found |= run_world(folder, number, size, tasks)
    return found


def task(way: Way) -> list[str]:
    model, first, workers, second, _ = way
    return ["resume", model, second, f"{model} {first} {workers}"]


def run_world(folder: Path, number: int, size: int, tasks: list[Any]) -> dict[str, Any]:
    (folder / f"world-{number}.json").write_text(json.dumps(tasks))
    logs = [folder / f"log-{number}-{rank}" for rank in range(size)]
    running = []
    for rank, log in enumerate(logs):
        script = str(Path(__file__).with_name("resume_world.py"))
        with log.open("w") as said:
            running.append(
                subprocess.Popen(
                    [sys.executable, script, str(folder), str(rank), str(size), str(number)],
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


@pytest.mark.parametrize(
    ("ways", "way"),
    [
        pytest.param(ways, way, id=name(way), marks=marks)
        for ways, marks in ((SMALL, []), (LARGE, [pytest.mark.slow]))
        for way in ways
    ],
)
def test_a_run_goes_on_in_another_layout(
    told: Callable[[tuple[Way, ...]], dict[str, Any]], ways: tuple[Way, ...], way: Way
):
    model, first, workers, second, others = way
    found = told(ways)
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
