"""Bodies of fine-tuning routes are those of the openai SDK; what the platform cannot do is refused."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob as SdkJob
from openai.types.fine_tuning import FineTuningJobEvent as SdkEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint as SdkCheckpoint
from pydantic import ValidationError

from tandem.api.openai.fine_tuning import (
    CheckpointMetrics,
    DpoHyperparameters,
    DpoMethod,
    FineTuningCheckpoint,
    FineTuningCreation,
    FineTuningEvent,
    FineTuningJob,
    FineTuningMethod,
    SupervisedHyperparameters,
)

REQUEST = {"model": "base", "training_file": "file-1"}


def test_hyperparameters_are_numbers_or_auto() -> None:
    creation = FineTuningCreation.model_validate(
        {**REQUEST, "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": "auto"}}}}
    )
    assert creation.method is not None and creation.method.dpo is not None
    assert creation.method.dpo.hyperparameters == DpoHyperparameters(beta=0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": {"type": "reinforcement"}},
        {"method": {"type": "dpo", "supervised": {}}},
        {"method": {"type": "supervised"}, "hyperparameters": {}},
        {"hyperparameters": {"n_epochs": 0}},
        {"hyperparameters": {"learning_rate_multiplier": "nan"}},
        {"suffix": "a/b"},
        {"suffix": "s" * 65},
        {"metadata": {"k": "v" * 513}},
        {"integrations": [{"type": "mlflow"}]},
        {"n_epochs": 3},
    ],
)
def test_what_cannot_be_done_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FineTuningCreation.model_validate({**REQUEST, **wrong})


def test_the_sdk_reads_jobs_events_and_checkpoints() -> None:
    job = FineTuningJob(
        id="ftjob-1",
        created_at=1,
        model="base",
        organization_id="default",
        seed=0,
        status="running",
        training_file="file-1",
        hyperparameters=SupervisedHyperparameters(n_epochs=3),
        method=FineTuningMethod(type="dpo", dpo=DpoMethod(hyperparameters=DpoHyperparameters(beta=0.1))),
    )
    read = SdkJob.model_validate(job.model_dump())
    assert read.hyperparameters.n_epochs == 3 and read.method is not None and read.method.dpo is not None
    event = FineTuningEvent(id="ftevent-1", created_at=1, level="info", message="m", type="metrics", data={"step": 1})
    assert SdkEvent.model_validate(event.model_dump()).type == "metrics"
    checkpoint = FineTuningCheckpoint(
        id="ftckpt-1",
        created_at=1,
        fine_tuned_model_checkpoint="ft:base:default::1@1",
        fine_tuning_job_id="ftjob-1",
        metrics=CheckpointMetrics(step=2, train_loss=1.0),
        step_number=2,
    )
    assert SdkCheckpoint.model_validate(checkpoint.model_dump()).metrics.train_loss == 1.0
