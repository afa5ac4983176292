"""On a GPU: compiled layers, FlexAttention and the benchmark, all small. `pytest -m gpu tests/gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.settings import child_environment

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
BENCH = ["-m", "bench.training.gpu_train"]


@pytest.mark.parametrize("attention", ["flex", "sdpa"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tandem_learns_on_a_gpu_what_plain_torch_does(tmp_path: Path, attention: str, recompute: str):
    peers = measured(
        tmp_path, "--layers", "2", "--steps", "8", "--rounds", "1", "--rows", "2", "--length", "512", "--peers",
        "plain,tandem", "--attention", attention, "--recompute", recompute,
    )["peers"]  # fmt: skip
    assert peers["tandem"]["losses"] == pytest.approx(peers["plain"]["losses"], abs=0.05)
    assert 0 < peers["tandem"]["mfu"] < 1


def test_a_model_of_one_billion_fits_and_says_which_device_it_is_on(tmp_path: Path):
    found = measured(tmp_path, "--steps", "8", "--rounds", "1", "--rows", "2", "--peers", "tandem")
    assert found["device"] != "CPU"
    assert found["peers"]["tandem"]["memory_bytes"] < 60 * 2**30


def measured(folder: Path, *options: str) -> dict:
    """What the benchmark reports."""
    report = folder / "report.json"
    command = [sys.executable, *BENCH, *options, "--json", str(report)]
    done = subprocess.run(
        command, cwd=ROOT, env=child_environment({}), capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(report.read_text()))
