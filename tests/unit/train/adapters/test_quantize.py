"""4-bit base models: missing packages, and the number of packed weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tandem.errors import EnvironmentProblem
from tandem.train.adapters.quantize import count_weights, load_nf4


def test_a_missing_bitsandbytes_is_reported_with_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentProblem, match=r"needs bitsandbytes, which is not installed here\. `pip install"):
        load_nf4(tmp_path, "bfloat16", torch.device("cpu"))


def test_a_packed_parameter_counts_its_unpacked_weights():
    packed = torch.nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    assert count_weights(packed) == 24
    packed.quant_state = SimpleNamespace(shape=torch.Size([6, 8]))  # type: ignore[attr-defined]
    assert count_weights(packed) == 48
