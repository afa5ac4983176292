"""Engine arguments are checked by vLLM itself, in a process of its own, before any replica starts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import write_model

from tandem.config import ServeConfig, ServedModelConfig
from tandem.engine.create import EngineSpec, check_engine_args
from tandem.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def spec(folder: Path, **args: Any) -> EngineSpec:
    return EngineSpec(kind="vllm", id="tiny@1", name="tiny", path=str(folder), args=args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"max_model_length": 64}, "Did you mean 'max_model_len'"),
        ({"served_model_name": "x"}, r"set by models\[\]\.name"),
        ({"max_model_len": 1_000_000}, "1000000"),
        ({"max_loras": 2}, r"set by models\[\]\.max_adapters"),
    ],
)
def test_a_wrong_argument_is_refused_with_vllms_own_words_or_the_nearest_name(
    folder: Path, args: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check_engine_args(spec(folder, **args))
    assert "vllm" not in sys.modules


def test_right_arguments_pass(folder: Path) -> None:
    check_engine_args(spec(folder, max_model_len=64, max_num_seqs=4))


def test_a_mixture_on_the_cpu_is_served_without_adapters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mixture")
    values = json.loads((folder / "config.json").read_text())
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    values |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **experts}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"a mixture of experts.*Set models\[\]\.max_adapters to 0"):
        check_engine_args(spec(folder))
    check_engine_args(replace(spec(folder), max_adapters=0))


def test_the_app_is_not_built_with_a_wrong_argument(folder: Path, tandem_home: Path) -> None:
    from tandem.serve.app import build_app

    wrong = ServedModelConfig(model=str(folder), engine_args={"gpu_memory_utilisation": 0.5})
    with pytest.raises(ConfigError, match="Did you mean 'gpu_memory_utilization'"):
        build_app(ServeConfig(models=(wrong,)))
