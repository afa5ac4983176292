"""Picks the engine for a served model, without importing any that is not picked."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tandem import settings
from tandem.engine.protocol import Engine
from tandem.engine.spec import EngineSpec
from tandem.engine.validation_cache import is_validated, mark_validated
from tandem.engine.vllm.compile_cache import compile_cache_environment
from tandem.errors import ConfigError, EngineError
from tandem.registry.hub import restore

CHECK_TIMEOUT_S = 180.0


def create_engine(spec: EngineSpec) -> Engine:
    """The engine, not started. ConfigError if it does not take its arguments."""
    if spec.path:
        # A model of the hub, on a node whose home is not the one where it was downloaded.
        restore(Path(spec.path))
    if spec.kind == "echo":
        from tandem.engine.echo.engine import EchoEngine

        return EchoEngine.from_spec(spec)
    if spec.kind != "vllm":
        raise ConfigError(f"No engine is called {spec.kind!r}; there are vllm and echo.")
    # The libraries read these when they are imported, so they come first.
    settings.export(engine_environment(spec))
    try:
        from tandem.engine.vllm.engine import VllmEngine
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported here: {error}. Install it with `pip install tandem[cpu]` or `tandem[gpu]`."
        ) from error
    return VllmEngine(spec)


def check_engine_args(*specs: EngineSpec) -> None:
    """Have the engines check their arguments, unless they have before. Raises ConfigError with the first thing that is wrong."""
    unknown = [spec for spec in specs if not is_validated(spec)]
    for spec, verdict in zip(unknown, validation_errors(unknown), strict=True):
        if verdict is not None:
            raise ConfigError(verdict)
        mark_validated(spec)


def validation_errors(specs: Sequence[EngineSpec]) -> list[str | None]:
    """What is wrong with each spec: the key, with the nearest valid name or with the engine's words; None if nothing is.

    vLLM's are checked in one process, of their own so that this one does not import it.
    """
    for spec in specs:
        if spec.kind == "echo":
            create_engine(spec)
    found: list[str | None] = [None] * len(specs)
    asked = [i for i, spec in enumerate(specs) if spec.kind != "echo"]
    if not asked:
        return found
    question = json.dumps(
        [{name: getattr(specs[i], name) for name in EngineSpec.__slots__} for i in asked], default=dict
    )
    try:
        # vLLM leaves files in the temporary folder, and executes some.
        with tempfile.TemporaryDirectory(prefix="tandem-", ignore_cleanup_errors=True) as temporary:
            answer = subprocess.run(
                [sys.executable, "-m", "tandem.engine.vllm.arguments"],
                input=question,
                capture_output=True,
                text=True,
                timeout=CHECK_TIMEOUT_S,
                env=settings.child_environment({**engine_environment(specs[asked[0]]), "TMPDIR": temporary}),
            )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"vLLM did not check engine_args within {CHECK_TIMEOUT_S:.0f} s.") from error
    said = answer.stdout.strip().rpartition("\n")[2]
    if answer.returncode or not said:
        raise EngineError(f"vLLM could not check engine_args: {answer.stderr.strip()[-2000:]}")
    for i, verdict in zip(asked, json.loads(said), strict=True):
        found[i] = verdict
    return found


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Variables that vLLM and what is below it read; what the user has set stays. Raises EngineError."""
    variables = {
        **compile_cache_environment(),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # A forked child keeps the replica's mark out of the kernel's sight (reaper.py).
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if not spec.gpus:
        variables |= {
            # vLLM's default takes a share of all memory; "auto" binding puts every replica of a machine on one core.
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(spec.threads),
        }
    return variables
