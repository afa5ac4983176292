"""Training config of a fine-tuning job. Pure."""

from __future__ import annotations

from pathlib import Path

from tandem.config import (
    CheckpointConfig,
    DataConfig,
    DpoConfig,
    EvaluationConfig,
    LoraConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelismConfig,
    TrainConfig,
)
from tandem.jobs.fine_tuning.examples import Sizes
from tandem.jobs.fine_tuning.hyperparameters import ChosenHyperparameters, Plan
from tandem.jobs.fine_tuning.spec import FineTuningSpec, Method

WARMUP_SHARE = 0.05
"""Share of the steps over which the learning rate rises."""


def training_config(
    spec: FineTuningSpec,
    chosen: ChosenHyperparameters,
    plan: Plan,
    sizes: Sizes,
    *,
    data: Path,
    validation: Path | None,
) -> TrainConfig:
    """The config of the job whose examples are the dataset `data`: a LoRA adapter of the base.

    It is evaluated on `validation`, and saved, after each epoch.
    """
    platform, is_dpo = spec.platform, spec.method == Method.DPO
    return TrainConfig(
        name=spec.result,
        tenant=spec.tenant,
        data=DataConfig(path=str(data), sequence_length=sizes.sequence_length),
        model=ModelConfig(base=spec.base),
        lora=LoraConfig(rank=platform.rank, alpha=2.0 * platform.rank),
        objective="dpo" if is_dpo else "next_token",
        dpo=DpoConfig(beta=chosen.beta) if is_dpo else None,
        parallel=ParallelismConfig(
            workers=platform.workers,
            min_workers=platform.min_workers,
            cpus_per_worker=platform.cpus_per_worker,
            gpus_per_worker=platform.gpus_per_worker,
        ),
        optimizer=OptimizerConfig(
            learning_rate=platform.learning_rate * chosen.learning_rate_multiplier,
            weight_decay=0.0,
            warmup_steps=round(WARMUP_SHARE * plan.steps),
        ),
        steps=plan.steps,
        batch_size=plan.batch_rows,
        seed=spec.seed,
        precision=platform.precision,
        evaluation=None
        if validation is None
        else EvaluationConfig(data=str(validation), every_steps=plan.steps_per_epoch),
        checkpoint=CheckpointConfig(every_steps=plan.steps_per_epoch, exports=platform.checkpoints),
        metrics=MetricsConfig(wandb=spec.wandb),
    )
