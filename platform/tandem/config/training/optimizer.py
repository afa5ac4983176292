"""Optimizer config: AdamW, its learning-rate schedule and gradient clipping."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.config import check
from tandem.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    name: str = "adamw"
    """adamw, or adamw_8bit (Dettmers et al. 2022; its state takes 2 bytes a parameter instead of 8; on a GPU only)."""
    fused: bool = True
    """adamw: one kernel for the whole update, instead of one for each operation. adamw_8bit has its own kernel."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    """Of matrices; biases, norms and other vectors never decay."""
    decay_embeddings: bool = True
    """Whether embeddings decay too. One that is tied to the output counts as an embedding."""
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 10
    schedule: str = "cosine"
    """cosine or linear down to `final_fraction`; wsd: constant, then linear over the last `decay_steps`; or constant."""
    decay_steps: int | None = None
    """Steps of the decay at the end of wsd (warmup-stable-decay, Hu et al. 2024)."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""

    def __post_init__(self) -> None:
        check.one_of("optimizer.name", self.name, ("adamw", "adamw_8bit"))
        check.one_of("optimizer.schedule", self.schedule, ("cosine", "linear", "wsd", "constant"))
        check.at_least("optimizer.warmup_steps", self.warmup_steps, 0)
        check.at_least("optimizer.weight_decay", self.weight_decay, 0.0)
        check.at_least("optimizer.clip_norm", self.clip_norm, 0.0)
        check.between("optimizer.final_fraction", self.final_fraction, 0.0, 1.0)
        if not self.learning_rate > 0:
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0.")
        for number, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise ConfigError(f"optimizer.betas[{number}] is {beta}; it must be at least 0 and below 1.")
        if self.schedule == "wsd" and self.decay_steps is None:
            raise ConfigError(
                "optimizer.schedule is 'wsd' but optimizer.decay_steps is not set. Set it, to a tenth or a fifth of steps."
            )
        if self.decay_steps is not None:
            check.at_least("optimizer.decay_steps", self.decay_steps, 1)
            if self.schedule != "wsd":
                raise ConfigError(
                    f"optimizer.decay_steps is {self.decay_steps}, which only schedule 'wsd' has, and optimizer.schedule is "
                    f"{self.schedule!r}. Set schedule to 'wsd', or unset decay_steps."
                )
