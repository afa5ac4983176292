"""Environment variables of vLLM's processes, set before its libraries are imported."""

from __future__ import annotations

from tandem.engine.spec import EngineSpec
from tandem.engine.vllm.compile_cache import compile_cache_environment


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Variables that vLLM and the libraries below it read; those that the user has set stay. Raises EngineError."""
    variables = {
        **compile_cache_environment(),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        # A host in gateway.media_hosts may not send the engine on to another one.
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        # A forked child would inherit the replica's mark in a form that the kernel does not show (cluster/reaper.py).
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
