"""bench/training/gpu_train.py runs where there is no GPU, too: small, it shows that all peers train the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.settings import child_environment

ROOT = Path(__file__).parents[2]
BENCH = ["-m", "bench.training.gpu_train"]


@pytest.mark.slow  # a minute: it trains with three peers, two of which are not ours
def test_every_peer_of_the_gpu_benchmark_learns_the_same(tmp_path: Path):
    report = tmp_path / "report.json"
    command = [sys.executable, *BENCH, "--smoke", "--no-compile", "--json", str(report)]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment({}), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peers = json.loads(report.read_text())["peers"]
    assert list(peers) == ["plain", "trainer", "tandem"]
    for found in peers.values():
        assert found["losses"] == pytest.approx(peers["plain"]["losses"], abs=0.01)
        assert found["losses"][-1] < found["losses"][0]
        assert found["tokens_per_s"] > 0
        assert found["memory_bytes"] > 0
    assert "| tandem |" in report.with_suffix(".md").read_text()
