"""Chunked cross-entropy equals torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tandem.data.packing import IGNORED
from tandem.train.objectives import cross_entropy
from tandem.train.objectives.cross_entropy import chunked_cross_entropy


@pytest.mark.parametrize("piece", [1, 100, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_and_gradient_match_torch(monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", piece)
    torch.manual_seed(0)
    logits = (5 * torch.randn(23, 31)).to(dtype).requires_grad_()
    wanted = torch.randint(31, (23,))
    wanted[::4] = IGNORED
    found = chunked_cross_entropy(logits, wanted)
    (slopes,) = torch.autograd.grad(found * 0.7, logits)
    expected = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="sum")
    (expected_slopes,) = torch.autograd.grad(expected * 0.7, logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slopes, expected_slopes)


def test_rows_without_targets_have_zero_loss() -> None:
    logits = torch.full((3, 5), torch.inf).requires_grad_()
    for count in (3, 0):
        loss = chunked_cross_entropy(logits[:count], torch.full((count,), IGNORED))
        assert loss == 0
