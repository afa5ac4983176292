"""Checkpoints have the names and shapes of the plain model in every layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tandem.train.parallel import canonical as module
from tandem.train.parallel.canonical import canonical, canonical_name, persistent_buffers, sync_tied


class Stage(nn.Module):
    """A rank's part of a causal LM: the first stage, the last one, or both."""

    def __init__(self, *, first: bool, last: bool, tied: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        self.model = nn.Module()
        if first:
            self.model.embed_tokens = nn.Embedding(4, 3)
        if last:
            self.lm_head = nn.Linear(3, 4, bias=False)


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, True), (True, True)])
def test_a_tied_embedding_has_one_name_on_every_stage(first: bool, last: bool):
    stage = Stage(first=first, last=last)
    assert list(canonical(stage, dict(stage.named_parameters()))) == ["model.embed_tokens.weight"]


def test_an_untied_output_keeps_its_name():
    stage = Stage(first=True, last=True, tied=False)
    held = dict(stage.named_parameters())
    assert list(canonical(stage, held)) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert canonical_name(stage, "lm_head.weight") == "lm_head.weight"


def test_loading_updates_both_copies_of_a_tied_embedding():
    stage = Stage(first=True, last=True)
    held = dict(stage.named_parameters())
    (part,) = canonical(stage, held).values()
    (box,) = part.chunks.values()
    box.fill_(5.0)
    assert stage.model.embed_tokens.weight.unique().tolist() == [5.0] != stage.lm_head.weight.unique().tolist()
    sync_tied(stage, held)
    assert stage.lm_head.weight.unique().tolist() == [5.0]


@given(st.data())
def test_a_chunk_of_parallel_experts_becomes_a_gate_chunk_and_an_up_chunk(data: st.DataObject):
    experts, width, hidden = (data.draw(st.integers(1, 4)) for _ in range(3))
    whole = torch.arange(float(experts * 2 * width * hidden)).view(experts, 2, width, hidden)
    expected, found = whole.flatten(1, 2), torch.full((experts, 2 * width, hidden), -1.0)
    # Cut into four: by experts, and by the width of each.
    cut, inner = data.draw(st.integers(0, experts)), data.draw(st.integers(0, width))
    for first, last in ((0, cut), (cut, experts)):
        for begin, end in ((0, inner), (inner, width)):
            with pytest.MonkeyPatch.context() as patch:
                local = whole[first:last, :, begin:end]
                patch.setattr(module, "local_chunk", lambda t, f=first, b=begin, held=local: ((f, 0, b, 0), held))
                part = module._fused_experts(whole)
            assert part.shape == expected.shape
            for (e, i, h), box in part.chunks.items():
                where = (slice(e, e + box.shape[0]), slice(i, i + box.shape[1]), slice(h, h + box.shape[2]))
                assert (found[where] == -1).all()
                found[where] = box
    assert torch.equal(found, expected)


def test_loading_into_a_chunk_changes_the_experts(monkeypatch: pytest.MonkeyPatch):
    weight = torch.zeros(2, 2, 3, 4)
    for box in module._fused_experts(weight).chunks.values():
        box.fill_(1.0)
    assert weight.unique().tolist() == [1.0]


def test_only_persistent_buffers_are_saved():
    model: Any = nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer("made_anew", torch.ones(1), persistent=False)
    assert {name for name, _ in persistent_buffers(model)} == {
        "0.running_mean",
        "0.running_var",
        "0.num_batches_tracked",
    }
