"""Fine-tuning jobs as they are stored: specification and folder of a job in the store of work."""

from __future__ import annotations

import hashlib

from tandem.api.openai import fine_tuning as wire
from tandem.auth.tenants import DEFAULT_TENANT
from tandem.config import WandbConfig, from_dict
from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.ids import NAME_LENGTH
from tandem.jobs.fine_tuning.folder import FineTuningFolder
from tandem.jobs.fine_tuning.spec import FineTuningSpec, Hyperparameters, Method, result_name
from tandem.jobs.work.records import Job

TYPE = "fine_tuning"
"""`type` in the specification of such jobs."""
RUNNER = "fine_tuning"
"""Name of the runner that such jobs give, to run as Ray Jobs."""
SLURM_RUNNER = "slurm"
"""Likewise, to run as Slurm jobs."""


def is_fine_tuning(job: Job) -> bool:
    """Whether it is such a job."""
    return job.spec.get("type") == TYPE


def create_folder(job: Job) -> FineTuningFolder:
    """The folder by which a runner starts a job; the same one again where it exists."""
    return FineTuningFolder.create(spec_of(job))


def spec_of(job: Job) -> FineTuningSpec:
    """What a job's driver reads."""
    creation = wire.FineTuningCreation.model_validate(job.spec["request"])
    wandb = creation.integrations[0].wandb if creation.integrations else None
    locations, tenant = job.spec["locations"], job.tenant or DEFAULT_TENANT
    return FineTuningSpec(
        id=job.id,
        model=job.spec["model"],
        base=job.spec["base"],
        result=result_name(job.spec["base"], tenant, creation.suffix, job.id, NAME_LENGTH),
        tenant=tenant,
        training_file=creation.training_file,
        training_location=locations["training_file"],
        validation_file=creation.validation_file,
        validation_location=locations.get("validation_file"),
        method=(creation.method.type if creation.method else Method.SUPERVISED.value),
        hyperparameters=hyperparameters_of(creation),
        # Of the id, so that it is the same whenever it is asked for.
        seed=creation.seed if creation.seed is not None else int(hashlib.sha256(job.id.encode()).hexdigest()[:7], 16),
        wandb=None if wandb is None else WandbConfig(project=wandb.project, entity=wandb.entity),
        platform=from_dict(FineTuningConfig, job.spec["platform"]),
    )


def hyperparameters_of(creation: wire.FineTuningCreation) -> Hyperparameters:
    """What a client requested; None for `auto`."""
    method, requested = creation.method, creation.hyperparameters or wire.SupervisedHyperparameters()
    if method is not None and method.type == "dpo":
        requested = (method.dpo or wire.DpoMethod()).hyperparameters
    elif method is not None:
        requested = (method.supervised or wire.SupervisedMethod()).hyperparameters
    return Hyperparameters(**{key: None if value == "auto" else value for key, value in requested.model_dump().items()})
