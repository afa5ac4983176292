"""Evaluation is the mean over its rows for any batch size, and changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tandem.config import DpoConfig
from tandem.data.packing import IGNORED, Rows, pack
from tandem.data.tokenize import Encoded
from tandem.train.objectives.dpo import Dpo, FrozenReference
from tandem.train.objectives.evaluate import evaluate, rank_batches
from tandem.train.objectives.objective import NextToken
from tandem.train.parallel.model import ParallelModel

Alone = Callable[..., ParallelModel]

CPU = torch.device("cpu")


@pytest.fixture
def rows() -> Rows:
    packed = pack([Encoded(list(range(5, 5 + n)), [True] * n) for n in (9, 4, 12, 3, 8, 8, 11)], 12, 0, split=False)
    packed.flags.writeable = False  # as rows come out of Ray's shared memory
    return packed


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_evaluation_is_the_mean_over_all_tokens_with_its_perplexity(
    model: torch.nn.Module, alone: Alone, rows: Rows, batch_rows: int
):
    tokens = torch.from_numpy(rows.astype(np.int64))
    expected = float(NextToken().loss(model, tokens)[0].detach()) / int((rows[:, 1] != IGNORED).sum())
    found = evaluate(alone(model), NextToken(), rows, batch_rows=batch_rows, device=CPU)
    assert found == {"loss": pytest.approx(expected, abs=1e-5), "perplexity": pytest.approx(math.exp(found["loss"]))}


def test_evaluation_leaves_the_model_unchanged(model: torch.nn.Module, alone: Alone, rows: Rows):
    placed = alone(model).train()
    before = copy.deepcopy(model.state_dict())
    evaluate(placed, NextToken(), rows, batch_rows=2, device=CPU)
    assert placed.training and model.model.layers[0].training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_pairs_have_no_perplexity(model: torch.nn.Module, alone: Alone):
    from tandem.data.packing import pack_preferences

    pair = (Encoded([5, 6, 7], [False, True, True]), Encoded([5, 8], [False, True]))
    objective = Dpo(DpoConfig(), FrozenReference(copy.deepcopy(model).requires_grad_(False)))
    found = evaluate(alone(model), objective, pack_preferences([pair], 8, 0), batch_rows=4, device=CPU)
    assert found == {"loss": pytest.approx(math.log(2)), "reward_margin": 0.0, "reward_accuracy": 0.0}


@pytest.mark.parametrize(("ranks", "batch_rows"), [(1, 3), (2, 2), (3, 1), (4, 8)])
def test_ranks_share_the_rows_in_equally_many_batches(rows: Rows, ranks: int, batch_rows: int):
    dealt = [list(rank_batches(rows, rank, ranks, batch_rows)) for rank in range(ranks)]
    assert len({tuple(len(part) for part in parts) for parts in dealt}) == 1
    useful = [row for parts in dealt for part in parts for row in part if (row[1] != IGNORED).any()]
    key = lambda row: row.tobytes()  # noqa: E731
    assert sorted(map(key, useful)) == sorted(map(key, rows))
