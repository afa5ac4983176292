"""Direct preference optimization (Rafailov et al. 2023) against a frozen reference model.

For a pair of answers with log-probabilities p under the model and r under the reference,
    margin = beta x ((p_chosen - r_chosen) - (p_rejected - r_rejected))
    loss   = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin)        s: label smoothing (Mitchell 2023)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.config import DpoConfig
from tandem.data.packing import IGNORED
from tandem.train.model.build import reshard, unwrapped
from tandem.train.objectives.objective import Sums, compute_logits, shift_labels


class Reference(Protocol):
    """Provider of the reference model."""

    def model_for(self, model: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The reference for a `with` block; `model` is the one that is trained."""
        ...


class FrozenReference:
    """A reference that is a separate frozen model, distributed over the same mesh as the trained one."""

    def __init__(self, model: nn.Module) -> None:
        assert not any(p.requires_grad for p in model.parameters()), "a reference is frozen before it is sharded"
        self._model = model.eval()

    @contextlib.contextmanager
    def model_for(self, model: nn.Module) -> Iterator[nn.Module]:
        """The frozen model."""
        yield self._model
        # Without a backward pass, FSDP2 would keep its parameters gathered.
        reshard(self._model)


class AdapterDisabledReference:
    """A reference that is the trained model with its adapters disabled: it takes no extra memory."""

    @contextlib.contextmanager
    def model_for(self, model: nn.Module) -> Iterator[nn.Module]:
        """`model` without adapters and dropout."""
        adapted: Any = unwrapped(model)
        training = model.training
        model.eval()
        try:
            with adapted.disable_adapter():
                yield model
                # peft freezes the adapters here and unfreezes them on exit: that has to reach the sharded parameters.
                reshard(model)
        finally:
            model.train(training)


class Dpo:
    """DPO over rows of pairs [B, 6, T] (see `tandem.data.packing`)."""

    unit = "pairs"

    def __init__(self, config: DpoConfig, reference: Reference) -> None:
        self._config = config
        self._reference = reference

    def count(self, rows: Tensor) -> Tensor:
        """Number of pairs in rows."""
        return torch.tensor(len(answer_lengths(rows[:, 1], rows[:, 2])), device=rows.device)

    def loss(self, model: nn.Module, rows: Tensor) -> tuple[Tensor, Sums]:
        """The summed loss, reward margin (beta times the gain on the reference) and accuracy (share of positive margins)."""
        # Both answers in one forward pass: a sharded model gathers its parameters once.
        answer_rows = torch.cat((rows[:, :3], rows[:, 3:]))
        with torch.no_grad(), self._reference.model_for(model) as reference:
            reference_log_probs = answer_log_probabilities(reference, answer_rows)
        chosen, rejected = (answer_log_probabilities(model, answer_rows) - reference_log_probs).chunk(2)
        margins_P = self._config.beta * (chosen - rejected)
        return dpo_losses(margins_P, self._config.label_smoothing).sum().float(), {
            "reward_margin": margins_P.detach().sum().float(),
            "reward_accuracy": (margins_P.detach() > 0).sum().float(),
        }


def dpo_losses(margins_P: Tensor, label_smoothing: float) -> Tensor:
    """The loss of each pair."""
    return -(1 - label_smoothing) * F.logsigmoid(margins_P) - label_smoothing * F.logsigmoid(-margins_P)


def answer_log_probabilities(model: nn.Module, rows_B3T: Tensor) -> Tensor:
    """log p of each answer given its prompt, in the order of rows and of documents in them: float64 [answers].

    float64, because a margin is a small difference of large sums.
    """
    ids, labels, positions = rows_B3T[:, 0], rows_B3T[:, 1], rows_B3T[:, 2]
    targets = shift_labels(labels).flatten()
    target_indices = (targets != IGNORED).nonzero().squeeze(1)
    logits_NV = compute_logits(model, ids, positions).flatten(0, 1).index_select(0, target_indices)
    tokens_N = -F.cross_entropy(logits_NV.float(), targets[target_indices], reduction="none")
    # Deterministic on a GPU, unlike a scatter. `unsafe` skips checks that would refuse a batch without answers.
    return torch.segment_reduce(tokens_N.double(), "sum", lengths=answer_lengths(labels, positions), unsafe=True)


def answer_lengths(labels_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """Labelled tokens of each document that has any, in the order of rows and of documents in them: int64 [answers]."""
    documents = (positions_BT == 0).flatten().cumsum(0)
    lengths: Tensor = documents[(labels_BT != IGNORED).flatten()].unique_consecutive(return_counts=True)[1]
    return lengths
