"""Every layout trains, evaluates, exports and resumes as one process does: the cells of bench/training/parity.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from resume_world import load_parity

parity = load_parity()


@pytest.fixture(scope="module")
def row() -> Callable[[Any], dict[str, Any]]:
    """The table's row of a case; those with so many processes, of every run or of the others, share a world."""
    known: dict[tuple[int, bool], dict[str, dict[str, Any]]] = {}

    def of(case: Any) -> dict[str, Any]:
        world = (case.workers, case.first)
        if world not in known:
            cases = [other for other in parity.CASES if (other.workers, other.first) == world]
            known[world] = {row["case"]: row for row in parity.measure(cases)}
        return known[world][case.name]

    return of


@pytest.mark.parametrize(
    "case",
    [
        # Slow: each starts up to eight processes; the first layout of each kind is not.
        pytest.param(case, id=f"{case.workers}-{case.name}", marks=[] if case.first else [pytest.mark.slow])
        for case in parity.CASES
    ],
)
def test_a_layout_gives_what_one_process_gives(row: Callable[[Any], dict[str, Any]], case: Any):
    found = row(case)
    assert {column: found[column] for column in parity.COLUMNS} == pytest.approx(
        dict.fromkeys(parity.COLUMNS, 0.0), abs=parity.BAR
    )


def test_the_cases_cover_every_layout_that_is_promised():
    wanted = {
        ("llama", 2, "strategy ddp"), ("llama", 2, "strategy fsdp2"), ("llama", 4, "replicate 2"), ("llama", 2, "tensor 2"),
        ("llama", 2, "context 2"), ("llama", 8, "pipeline 2, tensor 2"), ("moe", 2, "expert 2"),
        ("moe", 4, "tensor 2, expert 2"), ("llama+lora", 4, "tensor 2"), ("llama", 2, "strategy fsdp2, dpo"),
        *(("llama", 2, f"pipeline 2, schedule {s}") for s in ("gpipe", "1f1b", "interleaved", "zero bubble")),
    }  # fmt: skip
    assert wanted <= {(c.model, c.workers, c.name.partition(": ")[2]) for c in parity.CASES}
