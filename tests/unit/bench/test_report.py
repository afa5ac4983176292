"""What the benchmarks write: figures as rounds end, and the whole report at the end."""

from __future__ import annotations

import json
from pathlib import Path

from bench.harness.report import Rounds, write


def test_a_round_is_in_the_file_as_soon_as_it_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "results" / "figures.json"
    rounds = Rounds(path)
    rounds.append({"ms": 1.0})
    rounds.append({"ms": 2.0})
    assert json.loads(path.read_text()) == {"unfinished": True, "rounds": [{"ms": 1.0}, {"ms": 2.0}]}
    write(path, {"rounds": rounds}, "# Page\n")
    assert json.loads(path.read_text()) == {"rounds": [{"ms": 1.0}, {"ms": 2.0}]}


def test_without_a_file_rounds_are_only_kept() -> None:
    rounds = Rounds(None)
    rounds.append(1)
    assert list(rounds) == [1]
