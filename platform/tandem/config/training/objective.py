"""Objective config: DPO, and evaluation on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class DpoConfig:
    """Direct preference optimization (Rafailov et al. 2023)."""

    beta: float = 0.1
    """Weight of the divergence from the reference: the larger, the closer the model stays to it."""
    label_smoothing: float = 0.0
    """Assumed share of flipped preferences (Mitchell 2023)."""
    reference: str | None = None
    """Reference: a registered model or a folder; unset: `model.base`. With lora, that is the model without its adapter."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"dpo.beta is {self.beta}; it must be above 0, such as 0.1.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"dpo.label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5, "
                "where nothing is preferred any more."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on held-out rows, always the same ones."""

    every_steps: int = 100
    """Steps between evaluations; 0 evaluates only at the end. The last step always does."""
    rows: int = 64
    """Packed rows, at most."""
    data: str | None = None
    """Another dataset of the same kind to evaluate on; unset: a share of the training data is held out."""
    held_out: float | None = None
    """Share of the training data's shards that is not trained on, above 0, at most 0.5; unset: 0.05, or none with `data`."""

    def __post_init__(self) -> None:
        check.at_least("evaluation.every_steps", self.every_steps, 0)
        check.at_least("evaluation.rows", self.rows, 1)
        if self.held_out is None:
            return
        check.between("evaluation.held_out", self.held_out, 0.0, 0.5)
        if self.data is not None and self.held_out:
            raise ConfigError(
                f"evaluation.data ({self.data}) and evaluation.held_out ({self.held_out}) are both set; rows come from one "
                "of them. Unset the other."
            )
        if self.data is None and not self.held_out:
            raise ConfigError(
                "evaluation.held_out is 0 and evaluation.data is not set, so there is nothing to evaluate on. "
                "Set held_out to a share such as 0.05, or name a dataset."
            )

    @property
    def share(self) -> float:
        """Share of the training data that is held out."""
        return 0.0 if self.data is not None else 0.05 if self.held_out is None else self.held_out
