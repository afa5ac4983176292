"""Tensor groups stay inside a node: where Ray puts them otherwise, training says so before it begins."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.data.tokenize import train_tokenizer
from tandem.settings import child_environment


@pytest.mark.slow  # a cluster of two hosts in network namespaces
def test_a_tensor_group_is_on_one_node_or_refused(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(["some words to learn from"] * 5, tokenizer, vocab_size=280)
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("two_nodes.py")), str(tokenizer), str(tmp_path)],
        env=child_environment({"TANDEM_HOME": str(tmp_path), "RAY_ADDRESS": None, "OMP_NUM_THREADS": "1"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    spread = r"^1\.0 REFUSED parallel\.tensor \(2\) makes a group of ranks \d to \d, which Ray has put on 2 nodes: rank.* lower"
    assert re.search(spread, result.stdout, re.MULTILINE), result.stdout + result.stderr[-3000:]
    assert re.search(r"^1\.5 TRAINED 1$", result.stdout, re.MULTILINE), result.stdout + result.stderr[-3000:]
