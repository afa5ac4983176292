"""Each benchmark explains its options, and runs. Programs without options, which other benchmarks start, have no help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"
WITH_OPTIONS = sorted(path for path in BENCH.glob("*.py") if "argparse.ArgumentParser(" in path.read_text())


@pytest.mark.parametrize("program", WITH_OPTIONS, ids=lambda path: path.stem)
def test_a_benchmark_prints_its_help(program: Path) -> None:
    done = subprocess.run([sys.executable, str(program), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {program.name}")


@pytest.mark.slow
def test_the_checkpoint_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / "checkpoint.py"), "--quick", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert out.with_suffix(".md").read_text().startswith("# What a checkpoint costs")
