"""Each benchmark explains its options and runs with --smoke."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench.cluster.common import SKIPPED_STATUS

ROOT = Path(__file__).parents[3]
AREAS = ("cluster", "serving", "routing", "scheduling", "training")
PROGRAMS = sorted(
    f"bench.{area}.{path.stem}"
    for area in AREAS
    for path in (ROOT / "bench" / area).glob("*.py")
    if "options_parser(" in path.read_text()
)


def run(module: str, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_benchmark_prints_its_help_with_the_common_options(module: str) -> None:
    done = run(module, "--help")
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for option in ("--json", "--check", "--smoke"))


@pytest.mark.slow  # each starts engines, clusters or process groups: together about 20 minutes
@pytest.mark.parametrize("module", PROGRAMS)
def test_a_benchmark_runs_and_writes_its_figures(module: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = run(module, "--smoke", "--json", str(figures), timeout_s=550)
    if done.returncode == SKIPPED_STATUS:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads(figures.read_text())
    assert figures.with_suffix(".md").read_text().startswith("# ")
