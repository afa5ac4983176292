"""A run resumes exactly in any other layout, with fewer or more workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from resume_world import load_parity
from resume_worlds import Way, check, run_worlds

parity = load_parity()

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
FOUR: tuple[Way, ...] = (
    ("llama", "tp2", 4, "fsdp2", 4),
    ("llama", "fsdp2", 4, "fsdp2", 2),
)
LARGE: tuple[Way, ...] = (
    ("llama", "fsdp2", 4, "tp2", 4),
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


@pytest.mark.parametrize(
    ("ways", "way"),
    [
        pytest.param(ways, way, id=name(way), marks=marks)
        # Worlds of four processes on two cores take minutes.
        for ways, marks in ((SMALL, []), (FOUR, [pytest.mark.slow]), (LARGE, [pytest.mark.slow]))
        for way in ways
    ],
)
def test_a_run_resumes_in_another_layout(
    told: Callable[[tuple[Way, ...]], dict[str, Any]], ways: tuple[Way, ...], way: Way
):
    check(parity, told(ways), way)
