"""vLLM's arguments for an engine spec, validated by vLLM's own classes; as a program, validates the specs on stdin.

Names and types are validated anywhere; what depends on the device (`make_config`) only where such a device is present.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import vllm.config.quantization
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs, make_arg_parser
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tandem.engine.spec import EngineSpec
from tandem.engine.vllm.parsers import Parsers, served_parsers, tool_arguments
from tandem.errors import ConfigError, did_you_mean

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""
ARGUMENTS_OF_MODEL_KEYS = {
    "model": "model",
    "served_model_name": "name",
    "enable_lora": "max_adapters",
    "max_loras": "max_adapters",
    "max_cpu_loras": "max_cached_adapters",
    "max_lora_rank": "max_lora_rank",
}
"""Arguments that are set by keys of `models[]`, and the key of each."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model in the scheduler's process: vLLM's own default on a GPU."""
PARALLEL_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def parse_args(spec: EngineSpec) -> argparse.Namespace:
    """vLLM's server arguments for `spec`.

    ConfigError with the key: with the nearest valid name for an unknown one, with vLLM's words for a wrong type.
    """
    types = _argument_types()
    values = {}
    for key, value in spec.args.items():
        where = f"{spec.where}.{key}"
        if key in ARGUMENTS_OF_MODEL_KEYS:
            raise ConfigError(f"{where} is set by models[].{ARGUMENTS_OF_MODEL_KEYS[key]}; use that.")
        if key not in types:
            hint = did_you_mean(key.replace("-", "_"), types)
            raise ConfigError(f"{where} is not an argument of vLLM's engine.{hint}")
        try:
            values[key] = _type_adapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise _refusal_error(where, error) from error
    args: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    for key, value in {**_defaults(spec), **values, **tool_arguments(parsers_of(spec), values)}.items():
        setattr(args, key, value)
    return args


def make_config(args: argparse.Namespace, spec: EngineSpec) -> VllmConfig:
    """vLLM's validated configuration; ConfigError with vLLM's message for a value that it refuses."""
    try:
        validate_api_server_args(args)
        usage = UsageContext.LLM_CLASS if spec.offline else UsageContext.OPENAI_API_SERVER
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=usage)
    except ValidationError as error:
        raise _refusal_error(spec.where, error, spec.args) from error
    except (Exception, SystemExit) as error:
        settings = ", ".join(f"{key}={value!r}" for key, value in spec.args.items()) or "none"
        raise ConfigError(f"{spec.where}: vLLM refuses the settings of {spec.name} ({settings}): {error}") from error
    if "structured_outputs_config" not in spec.args and not _is_validated_again(config):
        # vLLM takes the flag of `_defaults` only beside a named backend, but both that `auto` chooses from follow it: so schemas
        # that xgrammar lacks are answered by the other.
        config.structured_outputs_config.backend = "auto"
    if spec.max_adapters and not spec.gpus and config.model_config.is_moe:
        # With adapters on, vLLM routes tokens to experts by a kernel that its CPU build lacks, whatever the adapters adapt.
        raise ConfigError(
            f"{spec.name} is a mixture of experts, which vLLM serves with adapters on GPUs only; gpus_per_replica is 0 and "
            f"max_adapters is {spec.max_adapters}. Set models[].max_adapters to 0, or gpus_per_replica."
        )
    return config


def _is_validated_again(config: VllmConfig) -> bool:
    """Whether vLLM copies the configuration, and so validates it anew, while it loads parts of the model."""
    return bool(config.speculative_config is not None or config.model_config.is_multimodal_model)


def parsers_of(spec: EngineSpec) -> Parsers:
    """Parsers selected for the model, unless `engine_args` name others."""
    return served_parsers(Path(spec.path), spec.args)


def device_is_here(spec: EngineSpec) -> bool:
    """Whether this process's vLLM build matches the replica's device: a head node may lack the GPUs of its workers."""
    return bool(current_platform.is_cpu()) != bool(spec.gpus)


def _defaults(spec: EngineSpec) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "model": spec.path,
        "served_model_name": list(dict.fromkeys((spec.id, spec.name))),
        "enable_lora": spec.max_adapters > 0,
        # The guard offers no OpenAPI schema, and making it takes start-up time.
        "disable_fastapi_docs": True,
        # A weak model writes blanks between the parts of a JSON object without end (docs/adr/0023).
        "structured_outputs_config": StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
    }
    parsers = parsers_of(spec)
    if parsers.reasoning is not None:
        defaults["reasoning_parser"] = parsers.reasoning
    if spec.offline:
        # The default of vLLM's LLM class: no client watches the statistics of a batch run.
        defaults["disable_log_stats"] = True
    if spec.max_adapters:
        defaults |= {
            "max_loras": slots_of(spec),
            "max_cpu_loras": cached_of(spec),
            "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= spec.max_lora_rank),
        }
    if not spec.gpus:
        # bfloat16 dies in vLLM's AMX attention on some virtual machines; compiling costs more than it gives on a CPU.
        defaults |= {"dtype": "float32", "enforce_eager": True}
        if spec.args.get("speculative_config"):
            defaults["worker_extension_cls"] = "tandem.engine.vllm.cpu.CpuWorkerExtension"
        if all(spec.args.get(key, 1) == 1 for key in PARALLEL_SIZES):
            # vLLM gives the one worker of a CPU a process of its own to bind its threads there, which we do not. The two then
            # take turns spinning for each other: without, a small model is a tenth faster (bench/serving/serve_overhead.py).
            defaults["distributed_executor_backend"] = ONE_PROCESS
    return defaults


def slots_of(spec: EngineSpec) -> int:
    """vLLM's max_loras.

    On the CPU, a request for the base in a batch with others' adapters gets the last slot's adapter applied
    (vllm-project/vllm pull request 48421). One slot more, which the engine keeps empty, makes that harmless.
    """
    return spec.max_adapters + (not spec.gpus)


def cached_of(spec: EngineSpec) -> int:
    """vLLM's max_cpu_loras: what is in a slot is in host memory too."""
    return max(spec.max_adapters, spec.max_cached_adapters) + (not spec.gpus)


@functools.cache
def _argument_types() -> dict[str, Any]:
    """Every argument of vLLM's engine and of its OpenAI app, with the type that vLLM declares for it."""
    types: dict[str, Any] = {}
    for cls in (AsyncEngineArgs, BaseFrontendArgs):
        # One name there is imported for type checkers only.
        hints = typing.get_type_hints(cls, localns=vars(vllm.config.quantization))
        types |= {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return types


def _type_adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        # torch.dtype and classes, which pydantic can only compare.
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return TypeAdapter(hint)  # a class of vLLM's that has a configuration of its own


def _refusal_error(
    where: str, error: ValidationError, engine_args: Mapping[str, Any] = MappingProxyType({})
) -> ConfigError:
    """vLLM's first validation error as a ConfigError whose key is `where` and the argument among the `engine_args`.

    Without the link to pydantic's manual that its own text ends with.
    """
    first_error = error.errors()[0]
    path = [str(part) for part in first_error["loc"]]
    message = str(first_error["msg"]).removeprefix("Value error, ").rstrip(". ")
    if not path and engine_args:
        # A check of several settings at once: pydantic's input is then all of them, with vLLM's defaults.
        named_keys = [key for key in engine_args if re.search(rf"\b{re.escape(key)}\b", message)]
        if len(named_keys) == 1:
            return ConfigError(f"{where}.{named_keys[0]}: vLLM refuses {engine_args[named_keys[0]]!r}: {message}.")
        return ConfigError(f"{where}: vLLM refuses these settings: {message}.")
    if engine_args and path and path[0] not in engine_args:
        # A configuration inside: its own class does not know which argument it is.
        path = [key for key, value in engine_args.items() if isinstance(value, dict) and path[0] in value][:1] + path
    suggestion = did_you_mean(str(first_error["input"]), re.findall(r"'([^']*)'", first_error["msg"]))
    return ConfigError(f"{'.'.join([where, *path])}: vLLM refuses {first_error['input']!r}: {message}.{suggestion}")


def main() -> int:
    """Validate the EngineSpecs on stdin; the last line on stdout is a JSON list of errors, null for valid specs."""
    # vLLM writes to stdout too, from C++ as well: it is redirected to stderr until the result is written.
    stdout = os.dup(1)
    os.dup2(2, 1)
    validation_errors: list[str | None] = []
    for values in json.load(sys.stdin):
        spec = EngineSpec(**values)
        try:
            args = parse_args(spec)
            if device_is_here(spec):
                make_config(args, spec)
            validation_errors.append(None)
        except ConfigError as error:
            validation_errors.append(str(error))
    with os.fdopen(stdout, "w") as file:
        file.write(json.dumps(validation_errors) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
