"""The result of a run is registered when it is exported, and again at the end if that failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_folders import small_model

from tandem import registry as registry_module
from tandem.config import DataConfig, TrainConfig
from tandem.config.training.job import CheckpointConfig
from tandem.errors import RegistryError, UnknownModelError
from tandem.observability.events import (
    CheckpointExported,
    CheckpointRegistered,
    Evaluated,
    Exported,
    RegistrationFailed,
)
from tandem.observability.journal import Journal
from tandem.train import registration
from tandem.train.registration import Origin, RegisteredResult, ResultRegistration

EXPORTED = Exported(step=10, loss=2.0, tokens=640)


class Registry:
    """Stands for `register_result`: fails a number of times, then registers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int = 0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.origins: list[Origin] = []
        self._failures = failures
        monkeypatch.setattr(registration, "register_result", self._register)

    def _register(self, config: TrainConfig, job: Path, origin: Origin, **numbers: Any) -> RegisteredResult:
        self.calls.append(numbers)
        self.origins.append(origin)
        if len(self.calls) <= self._failures:
            raise RegistryError("the registry does not answer.")
        return RegisteredResult(model="a@1", path=str(job / "export"))


def registration_of(tmp_path: Path, *, register: bool = True) -> tuple[ResultRegistration, Journal]:
    config = TrainConfig(name="a", data=DataConfig(path="x"), register=register)
    journal = Journal(tmp_path / "events.jsonl")
    registration = ResultRegistration(config, tmp_path, journal)
    registration.origin = Origin(base=None, dataset="digest when the job started")
    return registration, journal


def test_a_result_is_registered_once_with_loss_and_last_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    registry = Registry(monkeypatch)
    result, journal = registration_of(tmp_path)
    for loss in (3.0, 2.5):
        journal.write(Evaluated(step=10, measured={"loss": loss}))
    result.on_exported(EXPORTED)
    assert result.finish(EXPORTED).model == "a@1"
    assert registry.calls == [{"loss": 2.0, "evaluation": {"loss": 2.5}}]
    assert [origin.dataset for origin in registry.origins] == ["digest when the job started"]


def test_a_failure_is_an_event_and_registration_is_tried_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    registry = Registry(monkeypatch, failures=1)
    result, journal = registration_of(tmp_path)
    result.on_exported(EXPORTED)
    (event,) = journal.read()
    assert isinstance(event, RegistrationFailed) and "the registry does not answer." in event.error
    assert result.finish(EXPORTED).model == "a@1" and len(registry.calls) == 2


def test_a_second_failure_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Registry(monkeypatch, failures=2)
    result, _ = registration_of(tmp_path)
    result.on_exported(EXPORTED)
    with pytest.raises(RegistryError):
        result.finish(EXPORTED)


def test_a_job_with_register_false_is_not_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    registry = Registry(monkeypatch)
    result, _ = registration_of(tmp_path, register=False)
    result.on_exported(EXPORTED)
    assert result.finish(EXPORTED) == RegisteredResult(path=str(tmp_path / "export")) and not registry.calls


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultRegistration:
    """A run that registers its two newest checkpoints, in a registry of this test's own."""
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "home"))
    config = TrainConfig(name="a", data=DataConfig(path="x"), checkpoint=CheckpointConfig(exports=2), steps=100)
    result = ResultRegistration(config, tmp_path / "job", Journal(tmp_path / "events.jsonl"))
    result.origin = Origin(base=None, dataset="a digest")
    return result


def export_checkpoint(tmp_path: Path, step: int, content: str) -> CheckpointExported:
    folder = tmp_path / "job" / "exports" / f"step-{step}"
    small_model(folder, content)
    return CheckpointExported(step=step, path=str(folder), loss=float(step))


def registered_steps() -> dict[str, int]:
    return {record.id: record.lineage["steps"] for record in registry_module.Registry.open().versions("a")}


def test_the_newest_checkpoints_are_versions_of_a_name_that_means_none_yet(
    tmp_path: Path, checkpoints: ResultRegistration
):
    for step in (10, 20, 30):
        checkpoints.on_checkpoint_exported(export_checkpoint(tmp_path, step, str(step)))
    assert registered_steps() == {"a@2": 20, "a@3": 30}
    assert {folder.name for folder in (tmp_path / "job" / "exports").iterdir()} == {"step-20", "step-30"}
    with pytest.raises(UnknownModelError):
        registry_module.Registry.open().resolve("a")
    events = Journal(tmp_path / "events.jsonl").read()
    assert [(e.step, e.model) for e in events if isinstance(e, CheckpointRegistered)] == [
        (10, "a@1"),
        (20, "a@2"),
        (30, "a@3"),
    ]


def test_a_checkpoint_that_a_restarted_run_computes_again_replaces_its_version(
    tmp_path: Path, checkpoints: ResultRegistration
):
    for step, content in ((10, "a"), (20, "b"), (10, "c")):
        checkpoints.on_checkpoint_exported(export_checkpoint(tmp_path, step, content))
    assert registered_steps() == {"a@2": 20, "a@3": 10}
    assert (tmp_path / "job" / "exports" / "step-10" / "config.json").exists()


def test_a_checkpoint_that_cannot_be_registered_is_an_event(tmp_path: Path, checkpoints: ResultRegistration):
    checkpoints.on_checkpoint_exported(CheckpointExported(step=10, path=str(tmp_path / "gone")))
    (event,) = Journal(tmp_path / "events.jsonl").read()
    assert isinstance(event, RegistrationFailed) and event.error.startswith("The checkpoint of step 10: ")
