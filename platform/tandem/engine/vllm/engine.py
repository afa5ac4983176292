"""vLLM engine: vLLM's own OpenAI app around its AsyncLLM. Only this module, arguments.py and cpu.py import vllm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.utils import enable_scoring_api
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.metrics.loggers import StatLoggerBase

from tandem.engine.protocol import AdapterRef, EngineStats
from tandem.engine.spec import EngineSpec
from tandem.engine.ttft import TtftWindow
from tandem.engine.usage import TokenCounts, current_tokens
from tandem.engine.vllm.arguments import make_config, parse_args, parsers_of, slots_of
from tandem.engine.vllm.beam_search import count_beams
from tandem.engine.vllm.logs import quiet_refusals
from tandem.engine.vllm.warm_up import WarmUpFeatures, refusals, warm_up
from tandem.errors import EngineError
from tandem.registry.adapter_files import layer_kinds


class VllmEngine:
    """One vLLM engine. All of it lives in the event loop that `start` is called in."""

    def __init__(self, spec: EngineSpec) -> None:
        """Check the arguments by vLLM's own classes; ConfigError if they cannot be."""
        self._spec = spec
        self._args = parse_args(spec)
        self._config = make_config(self._args, spec)
        self._scheduler_stats = _SchedulerStats()
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
                # With a logger vLLM would compute statistics of each step, whatever disable_log_stats says.
                stat_loggers=None if self._spec.offline else [lambda config, index=0: self._scheduler_stats],
                disable_log_stats=self._args.disable_log_stats,
            )
            if not self._spec.offline:
                _count_tokens(self._llm)
            tasks = await self._llm.get_supported_tasks()
            # vLLM has no task of this name: it mounts the routes by this rule of its own.
            scores = ("score",) if enable_scoring_api(tasks, self._llm.model_config) else ()
            self._tasks = (*tasks, *scores)
            app = build_app(self._args, tasks, self._llm.model_config)
            quiet_refusals()
            await init_app_state(self._llm, app.state, self._args, tasks)
            for name in ("openai_serving_chat", "openai_serving_completion"):
                if (serving := getattr(app.state, name, None)) is not None:
                    count_beams(serving)
        except (Exception, SystemExit) as error:
            await self.drain(0.0)
            raise EngineError(f"vLLM could not load {self._args.model}: {error}") from error
        # vLLM's error handlers stop their server when the engine is dead. This one stays, to report it to the gateways.
        app.state.server = SimpleNamespace(should_exit=False)
        self._models = app.state.openai_serving_models
        if self._keeps_a_slot_empty:
            await self._reserve_last_slot()
        # A batch run needs no warm-up: no client waits for its first answers.
        if not self._spec.offline:
            await self._warm_up(app)
        self._app = app

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Add a LoRA adapter to the running engine (some milliseconds)."""
        if adapter.id in self._adapters:
            return
        models, llm = self._running_engine()
        await self._add_lora(models, llm, adapter.id, adapter.path)
        self._adapters = tuple(models.lora_requests)

    async def unload_adapter(self, adapter_id: str) -> None:
        """Take a LoRA adapter out of the engine and its memory."""
        models, llm = self._running_engine()
        request = models.lora_requests.pop(adapter_id, None)
        self._adapters = tuple(models.lora_requests)
        if request is not None:
            await llm.remove_lora(request.lora_int_id)

    @property
    def healthy(self) -> bool:
        """Whether it has started, and vLLM has not reported an error that it cannot recover from."""
        return self._llm is not None and not self._llm.errored

    def stats(self) -> EngineStats:
        """The load now, from vLLM's own counters."""
        if self._llm is None:
            return EngineStats(healthy=False)
        unfinished = self._llm.get_num_unfinished_requests()
        running = min(unfinished, self._scheduler_stats.running)
        return EngineStats(
            running=running,
            waiting=unfinished - running,
            max_running=self._config.scheduler_config.max_num_seqs * self._config.parallel_config.data_parallel_size,
            kv_usage=self._scheduler_stats.kv_usage if unfinished else 0.0,
            ttft_s=self._scheduler_stats.first_tokens.percentile_90(time.monotonic()),
            adapters=self._adapters,
            tasks=self._tasks,
            steps=self._scheduler_stats.steps,
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

    async def _warm_up(self, app: ASGIApp) -> None:
        """Send warm-up requests, so that clients do not wait for compilation; EngineError if the engine dies or hangs."""
        llm = self._running_engine()[1]
        parsers = parsers_of(self._spec)
        features = WarmUpFeatures(
            model=self._spec.id,
            tasks=self._tasks,
            chat=parsers.chat,
            tools=bool(self._args.tool_call_parser),
            # On a CPU with adapters they end vLLM's process (engine.vllm.requests).
            prompt_logprobs=bool(self._spec.gpus) or not self._spec.max_adapters,
            ranks=self._config.parallel_config.data_parallel_size,
        )
        try:
            refused_requests = await warm_up(app, features)
        except EngineError:
            await self.drain(0.0)
            raise
        if llm.errored:
            await self.drain(0.0)
            raise EngineError(
                f"vLLM's engine for {self._spec.id} died of its first requests: {refusals(refused_requests)}"
            )
        await llm.reset_prefix_cache()
        self._scheduler_stats.forget_first_tokens()

    async def _add_lora(self, models: OpenAIServingModels, llm: AsyncLLM, name: str, path: str) -> LoRARequest:
        request = LoRARequest(lora_name=name, lora_int_id=models.lora_id_counter.inc(1), lora_path=path)
        try:
            await llm.add_lora(request)
        except Exception as error:
            # An adapter may fail after a part of it was loaded: that must not stay.
            with contextlib.suppress(Exception):
                await llm.remove_lora(request.lora_int_id)
            raise EngineError(f"vLLM could not load the adapter {name}: {error}") from error
        models.lora_requests[name] = request
        return request

    async def _reserve_last_slot(self) -> None:
        """Fill all slots with empty adapters, pin the one in the last slot, and free the others.

        vLLM's CPU build applies the last slot's adapter to requests for the base model (`arguments.slots_of`): the slot must
        never hold another adapter, while vLLM moves adapters among the other slots.
        """
        models, llm = self._running_engine()
        names = [f"-{number}" for number in range(slots_of(self._spec))]
        with tempfile.TemporaryDirectory() as folder:
            last_error: EngineError | None = None
            for kind in layer_kinds(Path(self._spec.path)):
                write_empty_adapter(Path(folder), kind)
                try:
                    last_request = await self._add_lora(models, llm, names[0], folder)
                    break
                except EngineError as error:
                    # vLLM takes only kinds of layers that the model has, and some of those have no adapters.
                    last_error = error
            else:
                raise last_error or EngineError(
                    f"{self._spec.path} has no layer that takes an adapter. Set max_adapters to 0."
                )
            for name in names[1:]:
                last_request = await self._add_lora(models, llm, name, folder)
        await llm.pin_lora(last_request.lora_int_id)
        models.lora_requests.pop(names.pop())
        for name in names:
            await self.unload_adapter(name)

    @property
    def _keeps_a_slot_empty(self) -> bool:
        return self._spec.max_adapters > 0 and not self._spec.gpus

    def _running_engine(self) -> tuple[OpenAIServingModels, AsyncLLM]:
        if self._models is None or self._llm is None:
            raise EngineError("The engine has not been started.")
        return self._models, self._llm


def _count_tokens(llm: AsyncLLM) -> None:
    """Let vLLM's output processor add the counters of each sequence to the request that it is a part of (`engine.usage`).

    An aborted request that is no stream yields no output, so what `generate` yields would not tell its tokens.
    """
    processor = llm.output_processor
    add_request = processor.add_request

    def add_counted(request: EngineCoreRequest, prompt: str | None, parent: Any = None, *args: Any) -> None:
        add_request(request, prompt, parent, *args)
        tokens = current_tokens()
        if tokens is not None:
            state = processor.request_states[request.request_id]
            tokens.add(parent.request_id if parent else request.request_id, lambda: _counts_of(state))

    processor.add_request = add_counted


def _counts_of(state: RequestState) -> TokenCounts:
    prompt = 0 if state.is_prefilling else state.prompt_len
    return TokenCounts(prompt, state.detokenizer.num_output_tokens() if state.detokenizer else 0)


def write_empty_adapter(folder: Path, kind: str) -> None:
    """Write an adapter without effect in peft's format: for a layer that no model has, of a `kind` that vLLM knows."""
    config = {"r": 1, "lora_alpha": 1, "target_modules": [kind], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    zeros = np.zeros((1, 1), np.float32)
    tensors = {f"base_model.model.nowhere.{kind}.lora_{matrix}.weight": zeros for matrix in "AB"}
    save_file(tensors, folder / "adapter_model.safetensors")


class _SchedulerStats(StatLoggerBase):
    """The newest statistics of each scheduler (one for each data-parallel rank), which vLLM reports after every step."""

    def __init__(self, vllm_config: VllmConfig | None = None, engine_index: int = 0) -> None:
        self._ranks: dict[int, tuple[int, float]] = {}
        self.steps = 0
        """Steps of all ranks."""
        self.first_tokens = TtftWindow()

    @property
    def running(self) -> int:
        """Requests being generated, by all ranks."""
        return sum(running for running, _ in self._ranks.values())

    @property
    def kv_usage(self) -> float:
        """The fullest rank's share of its cache, 0 to 1."""
        return max((usage for _, usage in self._ranks.values()), default=0.0)

    def forget_first_tokens(self) -> None:
        """Drop the times of the warm-up."""
        self.first_tokens = TtftWindow()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step."""
        self.steps += 1
        if scheduler_stats is not None:
            self._ranks[engine_idx] = (scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage)
        if iteration_stats is not None and iteration_stats.time_to_first_tokens_iter:
            self.first_tokens.add(iteration_stats.time_to_first_tokens_iter, time.monotonic())

    def log_engine_initialized(self) -> None:
        """Log nothing."""
