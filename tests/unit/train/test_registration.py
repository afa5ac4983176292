"""The result of a run is registered when it is exported, and again at the end if that failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tandem.config import DataConfig, TrainConfig
from tandem.errors import RegistryError
from tandem.observability.events import Evaluated, Exported, RegistrationFailed
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
