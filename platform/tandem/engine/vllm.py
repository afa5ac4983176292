"""vLLM's own OpenAI app around its AsyncLLM. The only module that imports vllm; run it to check engine arguments."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs, make_arg_parser
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.utils import enable_scoring_api
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from tandem.engine.create import EngineSpec
from tandem.engine.protocol import AdapterRef, EngineStats
from tandem.errors import ConfigError, EngineError, TandemError, did_you_mean

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for."""
OURS = {"model": "model", "served_model_name": "name", "enable_lora": "max_adapters", "max_lora_rank": "max_lora_rank"}
"""Arguments that keys of the served model's own set."""
ONE_PROCESS = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""Runs the model in the scheduler's process: vLLM's own default on a GPU."""
WORLD = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class VllmEngine:
    """One vLLM engine. All of it lives in the event loop that `start` is called in."""

    def __init__(self, spec: EngineSpec) -> None:
        """Check the arguments by vLLM's own classes; ConfigError if they cannot be."""
        self._args = parse_args(spec)
        self._config = make_config(self._args, spec)
        self._load = _Load()
        self._llm: AsyncLLM | None = None
        self._app: ASGIApp | None = None
        self._models: OpenAIServingModels | None = None
        self._adapters: tuple[str, ...] = ()
        self._tasks: tuple[str, ...] = ()

    @property
    def app(self) -> ASGIApp:
        """vLLM's FastAPI app: far more routes than any client should reach."""
        if self._app is None:
            raise EngineError("The engine has not been started.")
        return self._app

    async def start(self) -> None:
        """Start vLLM's processes and load the model; takes most of a minute."""
        try:
            self._llm = AsyncLLM.from_vllm_config(
                vllm_config=self._config,
                stat_loggers=[lambda config, index=0: self._load],
                disable_log_stats=self._args.disable_log_stats,
            )
            tasks = await self._llm.get_supported_tasks()
            # vLLM has no task of this name: it mounts the routes by this rule of its own.
            scores = ("score",) if enable_scoring_api(tasks, self._llm.model_config) else ()
            self._tasks = (*tasks, *scores)
            app = build_app(self._args, tasks, self._llm.model_config)
            await init_app_state(self._llm, app.state, self._args, tasks)
        except (Exception, SystemExit) as error:
            await self.drain(0.0)
            raise EngineError(f"vLLM could not load {self._args.model}: {error}") from error
        # vLLM's error handlers tell their server to exit when the engine is dead. Ours stays, to say so to the gateways.
        app.state.server = SimpleNamespace(should_exit=False)
        self._models = app.state.openai_serving_models
        self._app = app

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Add a LoRA adapter to the running engine (some milliseconds)."""
        if adapter.id in self._adapters:
            return
        models = self._started()
        answer = await models.load_lora_adapter(LoadLoRAAdapterRequest(lora_name=adapter.id, lora_path=adapter.path))
        if isinstance(answer, ErrorResponse):
            raise EngineError(f"vLLM could not load the adapter {adapter.id}: {answer.error.message}")
        self._adapters = tuple(models.lora_requests)

    async def unload_adapter(self, adapter_id: str) -> None:
        """Take a LoRA adapter out of the engine and its memory."""
        models = self._started()
        request = models.lora_requests.pop(adapter_id, None)
        self._adapters = tuple(models.lora_requests)
        if request is not None and self._llm is not None:
            await self._llm.remove_lora(request.lora_int_id)

    def stats(self) -> EngineStats:
        """The load now, from vLLM's own books."""
        if self._llm is None:
            return EngineStats(healthy=False)
        unfinished = self._llm.get_num_unfinished_requests()
        running = min(unfinished, self._load.running)
        return EngineStats(
            running=running,
            waiting=unfinished - running,
            kv_usage=self._load.kv_usage if unfinished else 0.0,
            adapters=self._adapters,
            tasks=self._tasks,
            healthy=not self._llm.errored,
        )

    async def drain(self, timeout_s: float) -> None:
        """Wait for running requests, then end vLLM's processes."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        deadline = time.monotonic() + timeout_s
        while llm.get_num_unfinished_requests() and not llm.errored and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        with contextlib.suppress(Exception):
            await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)

    def _started(self) -> OpenAIServingModels:
        if self._models is None:
            raise EngineError("The engine has not been started.")
        return self._models


class _Load(StatLoggerBase):
    """Keeps the scheduler's newest numbers; vLLM hands them over after every step."""

    def __init__(self, vllm_config: VllmConfig | None = None, engine_index: int = 0) -> None:
        self.running = 0
        self.kv_usage = 0.0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def parse_args(spec: EngineSpec) -> argparse.Namespace:
    """vLLM's server arguments for `spec`; ConfigError with the nearest valid name for an unknown one."""
    known = {f.name for cls in (AsyncEngineArgs, BaseFrontendArgs) for f in dataclasses.fields(cls)}
    for key in spec.args:
        if key in OURS:
            raise ConfigError(f"engine_args.{key} is set by models[].{OURS[key]}; use that.")
        if key not in known:
            hint = did_you_mean(key.replace("-", "_"), known)
            raise ConfigError(f"engine_args.{key} is not an argument of vLLM's engine.{hint}")
    args: argparse.Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    chosen: dict[str, Any] = {
        "model": spec.path,
        "served_model_name": list(dict.fromkeys((spec.id, spec.name))),
        "enable_lora": spec.max_adapters > 0,
        # A fastapi schema of routes that nobody may reach is only start-up time.
        "disable_fastapi_docs": True,
    }
    if spec.max_adapters:
        # On the CPU, a request for the base in a batch with others' adapters gets the last slot's adapter applied
        # (vllm-project/vllm pull request 48421). One slot more than is ever used keeps the last one empty, so harmless.
        slots = spec.max_adapters + (not spec.gpus)
        chosen |= {
            "max_loras": slots,
            "max_cpu_loras": slots,
            "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= spec.max_lora_rank),
        }
    if not spec.gpus:
        # bfloat16 dies in vLLM's AMX attention on some virtual machines; compiling costs more than it gives on a CPU.
        chosen |= {"dtype": "float32", "enforce_eager": True}
        if all(spec.args.get(key, 1) == 1 for key in WORLD):
            # vLLM gives the one worker of a CPU a process of its own to bind its threads there, which we do not. The two then
            # take turns spinning for each other: without, a small model is a tenth faster (bench/serve_overhead.py).
            chosen["distributed_executor_backend"] = ONE_PROCESS
    for key, value in {**chosen, **spec.args}.items():
        setattr(args, key, value)
    if spec.max_adapters:
        _check_slots(args, spec)
    return args


def _check_slots(args: argparse.Namespace, spec: EngineSpec) -> None:
    needed = spec.max_adapters + (not spec.gpus)
    key = "max_cpu_loras" if spec.gpus else "max_loras"
    given = getattr(args, key)
    if isinstance(given, int) and given < needed:
        raise ConfigError(
            f"engine_args.{key} is {given}; max_adapters ({spec.max_adapters}) needs at least {needed}. "
            f"Lower max_adapters, or leave {key} out."
        )


def make_config(args: argparse.Namespace, spec: EngineSpec) -> VllmConfig:
    """vLLM's own checked configuration; ConfigError with its words for a value that it refuses."""
    try:
        validate_api_server_args(args)
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (Exception, SystemExit) as error:
        details = getattr(error, "errors", None)
        if callable(details):
            # pydantic's text ends in a link to its own manual; the plain messages are what a person needs.
            said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in details())
        else:
            said = str(error)
        given = ", ".join(f"{key}={value!r}" for key, value in spec.args.items()) or "none"
        raise ConfigError(
            f"vLLM refuses the settings of {spec.name} (engine_args: {given}). It says: {said}"
        ) from error
    if spec.max_adapters and not spec.gpus and config.model_config.is_moe:
        # With adapters on, vLLM routes tokens to experts by a kernel that its CPU build lacks, whatever the adapters adapt.
        raise ConfigError(
            f"{spec.name} is a mixture of experts, which vLLM serves with adapters on GPUs only; gpus_per_replica is 0 and "
            f"max_adapters is {spec.max_adapters}. Set models[].max_adapters to 0, or gpus_per_replica."
        )
    return config


def main() -> int:
    """Check the EngineSpec on stdin; the verdict is the last line on stdout, and the exit status."""
    # vLLM writes on stdout too, from C++ as well; only the verdict may go there.
    verdict = os.dup(1)
    os.dup2(2, 1)
    try:
        spec = EngineSpec(**json.load(sys.stdin))
        make_config(parse_args(spec), spec)
        answer: dict[str, str | None]
        answer, status = {"error": None}, 0
    except TandemError as error:
        answer, status = {"error": str(error)}, error.exit_code
    with os.fdopen(verdict, "w") as file:
        file.write(json.dumps(answer) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
