"""Engine arguments are checked by vLLM itself, in a process of its own, before any replica starts."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import write_model

from tandem.config import ServeConfig
from tandem.engine.create import validation_errors
from tandem.engine.spec import EngineSpec
from tandem.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def spec(folder: Path, **args: Any) -> EngineSpec:
    return EngineSpec(kind="vllm", id="tiny@1", name="tiny", path=str(folder), args=args)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"max_model_length": 64},
        "engine_args.max_model_length is not an argument .* Did you mean 'max_model_len'",
    ),
    "ours": ({"served_model_name": "x"}, r"set by models\[\]\.name"),
    "too long": ({"max_model_len": 1_000_000}, "1000000"),
    "ours too": ({"max_loras": 2}, r"set by models\[\]\.max_adapters"),
    "type": ({"max_num_seqs": "four"}, r"engine_args\.max_num_seqs: vLLM refuses 'four': .*valid integer"),
    "inner name": ({"structured_outputs_config": {"backnd": "x"}}, r"structured_outputs_config\.backnd: .*Unexpected"),
    "inner value": (
        {"speculative_config": {"method": "ngrams", "num_speculative_tokens": 2}},
        r"engine_args\.speculative_config\.method: vLLM refuses 'ngrams'.*Did you mean 'ngram'",
    ),
    "no such method": ({"quantization": "awqq"}, "awqq"),
}
ON_GPUS = {
    "tensor_parallel_size": 4,
    "quantization": "fp8",
    "kv_cache_dtype": "fp8_e5m2",
    "cpu_offload_gb": 8,
    "speculative_config": {"method": "eagle", "model": "somewhere", "num_speculative_tokens": 3},
    "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
    "reasoning_parser": "qwen3",
    "tool_call_parser": "hermes",
}
"""What this machine cannot run: checked by name and type."""


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str | None]:
    """vLLM's verdicts, from one process."""
    specs = {name: spec(folder, **args) for name, (args, _) in WRONG.items()}
    specs["right"] = spec(folder, max_model_len=64, max_num_seqs=4)
    specs["gpus"] = replace(spec(folder, **ON_GPUS), gpus=4.0)
    specs["wrong on gpus"] = replace(spec(folder, **{**ON_GPUS, "kv_cache_dtype": "fp9"}), gpus=4.0)
    found = dict(zip(specs, validation_errors(list(specs.values())), strict=True))
    assert "vllm" not in sys.modules
    return found


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_with_vllms_own_words_or_the_nearest_name(
    name: str, said: dict[str, str | None]
) -> None:
    assert re.search(WRONG[name][1], said[name] or "passed"), said[name]


def test_right_arguments_pass(said: dict[str, str | None]) -> None:
    assert said["right"] is None


def test_what_depends_on_gpus_is_checked_by_name_and_type_where_there_are_none(said: dict[str, str | None]) -> None:
    assert said["gpus"] is None
    assert "engine_args.kv_cache_dtype: vLLM refuses 'fp9'" in (said["wrong on gpus"] or "passed")


def test_a_mixture_on_the_cpu_is_served_without_adapters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mixture")
    values = json.loads((folder / "config.json").read_text())
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    values |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **experts}
    (folder / "config.json").write_text(json.dumps(values))
    with_adapters, without = validation_errors([spec(folder), replace(spec(folder), max_adapters=0)])
    assert re.search(r"a mixture of experts.*Set models\[\]\.max_adapters to 0", with_adapters or "passed")
    assert without is None


def test_a_wrong_argument_is_named_with_its_line(folder: Path, tandem_home: Path, tmp_path: Path) -> None:
    from tandem.apps.build import build_app
    from tandem.config import load_yaml, located

    path = tmp_path / "app.yaml"
    path.write_text(
        f"models:\n  - model: {folder}\n    engine_args:\n      max_num_seqs: 4\n      max_model_length: 64\n"
    )
    with (
        pytest.raises(ConfigError, match=r"app\.yaml line 5: models\[0\]\.engine_args\.max_model_length is not"),
        located(path),
    ):
        build_app(load_yaml(ServeConfig, path))
