"""Creation of fine-tuning jobs in the store: by which runner they run, and what they take of the cluster."""

from __future__ import annotations

import pytest

from tandem.api.openai.fine_tuning import FineTuningCreation
from tandem.config.serving.fine_tuning import FineTuningConfig
from tandem.errors import ConfigError, JobError
from tandem.files.store import FileStore
from tandem.jobs.fine_tuning.service import Base, FineTuningService
from tandem.jobs.work.records import Job, Resources
from tandem.jobs.work.store import JobStore


def created(store: JobStore, files: FileStore, platform: FineTuningConfig) -> Job:
    service = FineTuningService(store, files, platform)
    creation = FineTuningCreation(model="base", training_file="file-1")
    return store.get(service.create(creation, Base(name="base", id="base@1", max_rank=16), tenant="lab", key_id="").id)


def test_a_job_for_slurm_takes_nothing_of_the_apps_cluster_and_tells_slurm_what_it_needs(
    store: JobStore, files: FileStore
) -> None:
    job = created(store, files, FineTuningConfig(runner="slurm", workers=4, nodes=2, gpus_per_worker=2.0))
    assert (job.runner, job.spec["nodes"], job.spec["gpus_per_node"]) == ("slurm", 2, 4)
    assert job.resources == Resources(cpus_per_worker=0.0, min_workers=4, max_workers=4)
    job = created(store, files, FineTuningConfig(workers=4, gpus_per_worker=2.0))
    assert job.runner == "fine_tuning"
    assert job.resources == Resources(cpus_per_worker=1.0, gpus_per_worker=2.0, min_workers=4, max_workers=4)


def test_a_tenant_has_few_jobs_that_have_not_ended(store: JobStore, files: FileStore) -> None:
    job = created(store, files, FineTuningConfig(max_active=1))
    with pytest.raises(JobError, match="max_active"):
        created(store, files, FineTuningConfig(max_active=1))
    store.cancel(job.id)
    created(store, files, FineTuningConfig(max_active=1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"runner": "slrum"}, "Did you mean 'slurm'"),
        ({"nodes": 2, "workers": 2}, "nodes is for runner: slurm"),
        ({"runner": "slurm", "nodes": 2, "workers": 3}, "must be a multiple of nodes.*works is 4"),
        ({"runner": "slurm", "workers": 4, "min_workers": 2}, "min_workers is for runner: ray"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FineTuningConfig(**values)  # type: ignore[arg-type]
