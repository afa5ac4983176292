"""Worlds of gloo processes that run a script's cases on a small dataset, and what they gave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.data.packing import pack, pack_preferences
from tandem.data.tokenize import TextEncoder, train_tokenizer
from tandem.settings import child_environment


def run_worlds(script: str, folder: Path, sizes: tuple[int, ...] = (1, 2), arguments: tuple[str, ...] = ()) -> Path:
    """Worlds of `sizes` processes of a script in this folder; they write `results-SIZE-RANK.json` into `folder`."""
    texts = [f"Line {n}: the quick brown fox jumps over {n * 7 % 13} lazy dogs." for n in range(60)]
    train_tokenizer(texts, folder / "tokenizer", vocab_size=300)
    encoder = TextEncoder(str(folder / "tokenizer"))
    np.save(folder / "text.npy", pack(encoder.texts(texts), 32, encoder.pad_id, split=True))
    preferences = [
        ([{"role": "user", "content": f"{n}?"}], f"{n * 7 % 13} dogs", "the fox" if n % 3 else "quick")
        for n in range(60)
    ]
    np.save(folder / "preferences.npy", pack_preferences(encoder.preferences(preferences), 32, encoder.pad_id))
    for size in sizes:
        # Files, since a pipe that nobody reads yet fills up, and its process waits with all the others.
        logs = [folder / f"log-{size}-{rank}" for rank in range(size)]
        running = []
        for rank, log in enumerate(logs):
            command = [
                sys.executable,
                str(Path(__file__).with_name(script)),
                str(folder),
                str(rank),
                str(size),
                *arguments,
            ]
            with log.open("w") as said:
                running.append(
                    subprocess.Popen(
                        command, env=child_environment({"OMP_NUM_THREADS": "1"}), stdout=said, stderr=subprocess.STDOUT
                    )
                )
        try:
            for process, log in zip(running, logs, strict=True):
                assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
        finally:
            for process in running:
                process.kill()
    return folder


def result(world: Path, size: int, case: str, rank: int = 0) -> dict[str, Any]:
    """What a case gave on a rank of the world of `size`."""
    return dict(json.loads((world / f"results-{size}-{rank}.json").read_text())[case])


def alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Reports and evaluations of two runs are the same, but for rounding."""
    for key in ("steps", "evaluations"):
        assert len(found[key]) == len(expected[key])
        for ours, theirs in zip(found[key], expected[key], strict=True):
            assert ours.get("metrics") == pytest.approx(theirs.get("metrics"), abs=tolerance)
            # A perplexity is the exponential of its loss: it differs by as much as a share.
            assert {**ours, "metrics": 0} == pytest.approx({**theirs, "metrics": 0}, abs=tolerance, rel=tolerance)
