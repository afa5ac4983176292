"""vLLM's own OpenAI app around its AsyncLLM. Only this module and vllm_args.py import vllm."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.utils import enable_scoring_api
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from tandem.engine.create import EngineSpec
from tandem.engine.protocol import AdapterRef, EngineStats
from tandem.engine.vllm_args import make_config, parse_args
from tandem.errors import EngineError


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
    """Keeps each scheduler's newest numbers (one for each data-parallel rank); vLLM hands them over after every step."""

    def __init__(self, vllm_config: VllmConfig | None = None, engine_index: int = 0) -> None:
        self._ranks: dict[int, tuple[int, float]] = {}

    @property
    def running(self) -> int:
        """Requests being generated, by all ranks."""
        return sum(running for running, _ in self._ranks.values())

    @property
    def kv_usage(self) -> float:
        """The fullest rank's share of its cache, 0 to 1."""
        return max((usage for _, usage in self._ranks.values()), default=0.0)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        if scheduler_stats is not None:
            self._ranks[engine_idx] = (scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
