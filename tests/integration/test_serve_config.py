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
        ({"max_loras": 2}, "needs at least 9"),
        ({"max_num_seqs": "four"}, r"engine_args\.max_num_seqs: vLLM refuses it: 'four': .*valid integer"),
        (
            {"structured_outputs_config": {"backnd": "xgrammar"}},
            r"structured_outputs_config: .* backnd: Unexpected keyword",
        ),
        ({"speculative_config": {"method": "ngrams", "num_speculative_tokens": 2}}, "ngrams"),
        ({"quantization": "awqq"}, "awqq"),
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


def test_what_depends_on_gpus_is_checked_by_name_and_type_where_there_are_none(folder: Path) -> None:
    on_gpus = {
        "tensor_parallel_size": 4,
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e5m2",
        "cpu_offload_gb": 8,
        "speculative_config": {"method": "eagle", "model": "somewhere", "num_speculative_tokens": 3},
        "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
        "reasoning_parser": "qwen3",
        "tool_call_parser": "hermes",
    }
    check_engine_args(replace(spec(folder, **on_gpus), gpus=4.0))
    with pytest.raises(ConfigError, match=r"engine_args\.kv_cache_dtype: vLLM refuses it: 'fp9'"):
        check_engine_args(replace(spec(folder, **{**on_gpus, "kv_cache_dtype": "fp9"}), gpus=4.0))


def test_a_mixture_on_the_cpu_is_served_without_adapters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mixture")
    values = json.loads((folder / "config.json").read_text())
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    values |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **experts}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"a mixture of experts.*Set models\[\]\.max_adapters to 0"):
        check_engine_args(spec(folder))
    check_engine_args(replace(spec(folder), max_adapters=0))


def test_a_wrong_argument_is_named_with_its_line(folder: Path, tandem_home: Path, tmp_path: Path) -> None:
    from tandem.config import load_yaml, located
    from tandem.serve.app import build_app

    path = tmp_path / "app.yaml"
    path.write_text(
        f"models:\n  - model: {folder}\n    engine_args:\n      max_num_seqs: 4\n      max_model_length: 64\n"
    )
    with (
        pytest.raises(ConfigError, match=r"app\.yaml line 5: models\[0\]\.engine_args\.max_model_length is not"),
        located(path),
    ):
        build_app(load_yaml(ServeConfig, path))


def test_the_app_is_not_built_with_a_wrong_argument(folder: Path, tandem_home: Path) -> None:
    from tandem.serve.app import build_app

    wrong = ServedModelConfig(model=str(folder), engine_args={"gpu_memory_utilisation": 0.5})
    with pytest.raises(ConfigError, match="Did you mean 'gpu_memory_utilization'"):
        build_app(ServeConfig(models=(wrong,)))
