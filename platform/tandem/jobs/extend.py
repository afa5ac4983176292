"""Extension of a job that has ended: a child job that goes on from its last checkpoint, with more steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tandem.checkpoint import folders
from tandem.config import TrainConfig, apply_overrides, from_dict, to_dict
from tandem.config.training.job import ExtensionConfig
from tandem.errors import ConfigError, JobError
from tandem.jobs.folder import JobFolder


def extension_of(job: JobFolder, steps: int, *, rewarm: bool = False, overrides: Iterable[str] = ()) -> TrainConfig:
    """The config of a job that goes on from the last checkpoint of `job` for `steps` more steps.

    `overrides`: `a.b=c` of keys to change. JobError without a checkpoint, ConfigError where the schedule of the added steps would
    not be that of one longer run and `rewarm` does not say that this is meant.
    """
    config = job.config()
    checkpoint = folders.latest(folders.checkpoints_root(config.checkpoint, job.path))
    if checkpoint is None:
        raise JobError(f"{job.id} has no checkpoint to go on from. `tandem train status {job.id}` tells how it ended.")
    step = folders.read_state(checkpoint).step
    changed = from_dict(TrainConfig, apply_overrides(to_dict(config), overrides))
    extension = ExtensionConfig(job=job.id, checkpoint=str(checkpoint), step=step, rewarm=rewarm)
    extended = replace(changed, steps=step + steps, extends=extension)
    if not rewarm:
        check_schedule(config, extended, step)
    return extended


def check_schedule(before: TrainConfig, extended: TrainConfig, step: int) -> None:
    """ConfigError unless the first `step` steps had the learning rates that one run of all steps would have had. Pure."""
    schedule, decay_steps = before.optimizer.schedule, before.optimizer.decay_steps or 0
    if schedule == "constant" or (schedule == "wsd" and step <= before.steps - decay_steps):
        return
    reason = (
        f"its learning rate was decaying already at step {step}: the decay began at step {before.steps - decay_steps}"
        if schedule == "wsd"
        else f"with schedule {schedule} the learning rate of every step depends on the number of steps, and it was {before.steps}"
    )
    raise ConfigError(
        f"The result would not be that of one run of {extended.steps} steps: {reason}. Add --rewarm to warm up and decay anew "
        "over the added steps, or train anew with more steps. A schedule that can be extended is constant, or wsd before its "
        "decay."
    )
