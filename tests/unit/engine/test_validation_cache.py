"""Cache of validated engine arguments."""

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


def test_valid_arguments_are_cached(spec: EngineSpec) -> None:
    assert not is_validated(spec)
    mark_validated(spec)
    assert is_validated(spec)
    assert is_validated(replace(spec, where="models[3].engine_args"))


def test_other_arguments_or_model_files_are_not_cached(spec: EngineSpec) -> None:
    mark_validated(spec)
    assert not is_validated(replace(spec, args={"max_model_len": 65}))
    assert not is_validated(replace(spec, gpus=1.0))
    (Path(spec.path) / "config.json").write_text('{"hidden_size": 1}')
    assert not is_validated(spec)


def test_an_unwritable_cache_is_no_error(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE", "/proc/none")
    mark_validated(spec)
    assert not is_validated(spec)
