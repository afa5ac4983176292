"""A job is extended from its last checkpoint, where that gives what one longer run would have given."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from tandem.checkpoint.folders import SavedState
from tandem.config import DataConfig, OptimizerConfig, TrainConfig, to_dict
from tandem.errors import ConfigError, JobError
from tandem.jobs.extend import check_schedule, extension_of
from tandem.jobs.folder import JobFolder
from tandem.train.schedule import learning_rate


def config(steps: int = 100, **optimizer: object) -> TrainConfig:
    options = {"warmup_steps": 10, **optimizer}
    return TrainConfig(name="m", data=DataConfig(path="x"), steps=steps, optimizer=OptimizerConfig(**options))  # type: ignore[arg-type]


@pytest.fixture
def job(tandem_home: Path) -> JobFolder:
    """A job that ended at step 100."""
    folder = tandem_home / "jobs" / "m-1"
    checkpoint = folder / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(asdict(SavedState(step=100, tokens=1, loss=1.0, world=1))))
    (checkpoint / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config(schedule="constant"))))
    return JobFolder(folder)


def test_a_child_goes_on_from_the_last_checkpoint_with_more_steps(job: JobFolder) -> None:
    extended = extension_of(job, 50, overrides=["batch_size=4"])
    assert extended.extends is not None and extended.extends.job == "m-1"
    assert (extended.steps, extended.extends.step, extended.batch_size) == (150, 100, 4)
    assert extended.extends.checkpoint.endswith("step-00000100")


def test_a_job_without_a_checkpoint_cannot_be_extended(job: JobFolder) -> None:
    (job.path / "checkpoints" / "step-00000100" / "manifest.json").unlink()
    with pytest.raises(JobError, match="m-1 has no checkpoint to go on from"):
        extension_of(job, 50)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_that_depends_on_the_number_of_steps_is_refused_with_the_way_out(schedule: str) -> None:
    before, extended = config(schedule=schedule), config(150, schedule=schedule)
    with pytest.raises(ConfigError, match=f"with schedule {schedule} .* it was 100. Add --rewarm"):
        check_schedule(before, extended, 100)


def test_wsd_can_be_extended_before_its_decay_only() -> None:
    before, extended = config(schedule="wsd", decay_steps=20), config(150, schedule="wsd", decay_steps=20)
    check_schedule(before, extended, 80)
    with pytest.raises(ConfigError, match="the decay began at step 80"):
        check_schedule(before, extended, 81)


@pytest.mark.parametrize(("schedule", "step"), [("constant", 100), ("wsd", 80)])
def test_what_is_accepted_had_the_learning_rates_of_the_longer_run(schedule: str, step: int) -> None:
    decay = {"decay_steps": 20} if schedule == "wsd" else {}
    before, extended = config(schedule=schedule, **decay), config(150, schedule=schedule, **decay)
    check_schedule(before, extended, step)
    for each in range(1, step + 1):
        assert learning_rate(before.optimizer, each, 100) == learning_rate(extended.optimizer, each, 150)
