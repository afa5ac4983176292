"""Settings that an engine has found right are not asked about again, until something changes that the answer depends on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.engine.spec import EngineSpec
from tandem.engine.validation_cache import is_validated, mark_validated


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text("{}")
    args = {"max_model_len": 64, "speculative_config": {"method": "ngram"}}
    return EngineSpec(kind="vllm", id="m@1", name="m", path=str(tmp_path), args=args)


def test_what_passed_once_is_known(spec: EngineSpec) -> None:
    assert not is_validated(spec)
    mark_validated(spec)
    assert is_validated(spec)
    assert is_validated(replace(spec, where="models[3].engine_args"))


def test_other_settings_or_another_model_are_asked_about(spec: EngineSpec) -> None:
    mark_validated(spec)
    assert not is_validated(replace(spec, args={"max_model_len": 65}))
    assert not is_validated(replace(spec, gpus=1.0))
    (Path(spec.path) / "config.json").write_text('{"hidden_size": 1}')
    assert not is_validated(spec)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", "/proc/none")
    mark_validated(spec)
    assert not is_validated(spec)
