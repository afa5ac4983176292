"""Registration of a training job's result in the model registry."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.config import TrainConfig, to_dict
from tandem.data.index import find_parts, parts_digest
from tandem.errors import RegistryError, TandemError
from tandem.ids import digest
from tandem.observability.events import (
    CheckpointExported,
    CheckpointRegistered,
    Evaluated,
    Exported,
    RegistrationFailed,
)
from tandem.observability.journal import Journal
from tandem.registry import BaseRef, ModelRecord, Registry, find_base
from tandem.storage import Location, join, located, upload_folder


@dataclass(frozen=True, kw_only=True)
class RegisteredResult:
    """The result of a job, as the `finished` event names it."""

    model: str | None = None
    """Id in the registry; None if the config does not register the result."""
    base: str | None = None
    """Id of the base of an adapter."""
    path: str
    dora: bool = False


@dataclass(frozen=True)
class Origin:
    """The parents of a result, as they are when its job starts: files may be replaced while it runs."""

    base: BaseRef | None
    dataset: str
    """Digest of the training data."""

    @classmethod
    def of(cls, config: TrainConfig) -> Origin:
        """Looked up now. Raises DataError or an error of the base if one of them cannot be found."""
        return cls(job_base(config), parts_digest(find_parts(config.data)))


def job_base(config: TrainConfig) -> BaseRef | None:
    """The model that a job starts from; None for a new model."""
    return find_base(config.model.base) if config.model.base else None


def register_result(
    config: TrainConfig, job: Path, origin: Origin, *, loss: float | None, evaluation: Mapping[str, float] | None
) -> RegisteredResult:
    """Put the export of a job into the registry under the config's name, with its lineage; copied before to `export_to`.

    Registering the same files again gives the same id. Raises RegistryError or StorageError.
    """
    copy = copy_result(config, job)
    lineage = lineage_of(config, job, origin, config.steps, loss, evaluation)
    if copy is not None:
        lineage["copy"] = str(copy)
    record = _register(config, job / "export", copy, origin.base, lineage, promote=True)
    return RegisteredResult(model=record.id, base=record.base, path=record.location, dora=record.dora)


def register_checkpoint(config: TrainConfig, job: Path, origin: Origin, exported: CheckpointExported) -> ModelRecord:
    """Put an exported checkpoint into the registry as a version that is called by its id only. Raises RegistryError."""
    lineage = lineage_of(config, job, origin, exported.step, exported.loss, exported.evaluation)
    return _register(config, Path(exported.path), None, origin.base, lineage | {"checkpoint": True}, promote=False)


def lineage_of(
    config: TrainConfig,
    job: Path,
    origin: Origin,
    steps: int,
    loss: float | None,
    evaluation: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The lineage of weights after `steps` steps of a job."""
    base = origin.base
    lineage: dict[str, Any] = {
        "job": job.name,
        "dataset": origin.dataset,
        "config": digest(to_dict(config)),
        "steps": steps,
        "loss": loss,
        "evaluation": evaluation,
    }
    if config.extends is not None:
        lineage["extends"] = config.extends.job
    if base is not None and base.record and base.record.commit:
        lineage["base_commit"] = f"{base.record.lineage['hub']} {base.record.commit}"
    if base is not None and config.lora is None:
        lineage["base"] = base.id  # of an adapter it is a column of its own
    return lineage


def _register(
    config: TrainConfig,
    folder: Path,
    copy: Location | None,
    base: BaseRef | None,
    lineage: Mapping[str, Any],
    *,
    promote: bool,
) -> ModelRecord:
    registry = Registry.open()
    if config.lora is None:
        return registry.register_model(config.name, folder, lineage=lineage, promote=promote, tenant=config.tenant)
    assert base is not None, "TrainConfig refuses lora without a base"
    base_id = base.id
    if not base.record:
        base_id = registry.register_model(base.path.name, base.path, lineage={"source": "given as a folder"}).id
    return registry.register_adapter(
        config.name, copy or folder, base=base_id, lineage=lineage, promote=promote, tenant=config.tenant
    )


def copy_result(config: TrainConfig, job: Path) -> Location | None:
    """The place of the export's copy below `export_to`, made now; None if that is not set. Raises StorageError."""
    if config.export_to is None:
        return None
    target = join(located(config.export_to), job.name)
    # Without these files, a folder is taken for no model and no adapter.
    upload_folder(job / "export", target, last=("config.json", "adapter_config.json"))
    return target


class ResultRegistration:
    """Registers the result of one run: as soon as it is exported, and once more at the end if that failed.

    A failure is an event in the journal.
    """

    def __init__(self, config: TrainConfig, job: Path, journal: Journal) -> None:
        self._config, self._job, self._journal = config, job, journal
        self._result: RegisteredResult | None = None
        self.origin: Origin | None = None
        """Set when the job starts; looked up at the registration of a job that ended before."""

    def on_exported(self, exported: Exported) -> None:
        """Register now, while the workers end: the model can be requested some seconds earlier. Raises nothing."""
        try:
            self.finish(exported)
        except (TandemError, OSError) as error:
            self._journal.write(RegistrationFailed(error=f"{error} It is tried again when the run has ended."))

    def on_checkpoint_exported(self, exported: CheckpointExported) -> None:
        """Register a checkpoint, and remove those that `checkpoint.exports` newer ones follow. Raises nothing."""
        if not self._config.register:
            return
        try:
            origin = self.origin or Origin.of(self._config)
            record = register_checkpoint(self._config, self._job, origin, exported)
        except (TandemError, OSError) as error:
            self._journal.write(RegistrationFailed(error=f"The checkpoint of step {exported.step}: {error}"))
            return
        self._journal.write(CheckpointRegistered(step=exported.step, model=record.id))
        remove_old_checkpoints(record.name, self._job, keep=self._config.checkpoint.exports)

    def finish(self, exported: Exported) -> RegisteredResult:
        """The registered result; registers it unless `on_exported` has."""
        if not self._config.register:
            return RegisteredResult(path=str(copy_result(self._config, self._job) or self._job / "export"))
        if self._result is None:
            self._result = register_result(
                self._config,
                self._job,
                self.origin or Origin.of(self._config),
                loss=exported.loss,
                evaluation=last_evaluation(self._journal),
            )
        return self._result


def remove_old_checkpoints(name: str, job: Path, *, keep: int) -> None:
    """Remove a job's registered checkpoints, with their files, but the newest `keep`; one that an adapter is based on stays."""
    registry = Registry.open()
    # By step: after a restart, a step that is computed again has a newer version with the same folder.
    by_step: dict[int, list[ModelRecord]] = {}
    for record in registry.versions(name):
        if record.lineage.get("job") == job.name and record.lineage.get("checkpoint"):
            by_step.setdefault(record.lineage["steps"], []).append(record)
    newest_steps = sorted(by_step)[-keep:]
    for step, records in by_step.items():
        kept = [max(records, key=lambda record: record.version)] if step in newest_steps else []
        for record in records:
            if record in kept:
                continue
            with contextlib.suppress(RegistryError):
                registry.remove(record.id)
                if not kept:
                    shutil.rmtree(record.path, ignore_errors=True)


def last_evaluation(journal: Journal) -> Mapping[str, float] | None:
    """The numbers of a job's last evaluation."""
    evaluations = (event.measured for event in reversed(journal.read()) if isinstance(event, Evaluated))
    return next(evaluations, None)
