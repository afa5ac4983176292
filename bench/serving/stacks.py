"""Serving stacks that the benchmarks compare.

`python -m bench.serving.stacks NAME MODEL_FOLDER PORT` serves until its stdin closes, and prints READY after its first answer.
Tandem is measured as it is used: with an API key that has limits (the line `KEY ...`), usage records and the access log.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from bench.harness.keys import make_key

MODEL = "bench"
ARGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
"""Engine arguments that every stack gets; the environment is the same for all too."""
HEADERS: dict[str, str] = {}
"""Of the first request."""


@contextlib.contextmanager
def bare(folder: Path, port: int, *arguments: str) -> Iterator[None]:
    """vLLM's own server, as it comes."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", MODEL,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
        "--disable-uvicorn-access-log", *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def bare_one(folder: Path, port: int) -> contextlib.AbstractContextManager[None]:
    """The same with the executor that Tandem chooses on a CPU: the limit that Tandem can reach."""
    from tandem.engine.vllm.arguments import ONE_PROCESS

    return bare(folder, port, "--distributed-executor-backend", ONE_PROCESS)


@contextlib.contextmanager
def tandem(folder: Path, port: int) -> Iterator[None]:
    """Tandem as `tandem serve up` starts it."""
    from tandem.config import ServeConfig, ServedModelConfig

    # No adapters: the other stacks have none, and LoRA layers cost something even when unused.
    model = ServedModelConfig(model=str(folder), name=MODEL, max_adapters=0, engine_args=ARGS)
    with _app(ServeConfig(models=(model,)), port):
        yield


@contextlib.contextmanager
def echo(gateways: int, folder: Path, port: int) -> Iterator[None]:
    """Tandem around two engines that cost almost nothing: the gateway is measured."""
    from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig

    model = ServedModelConfig(model=MODEL, name=MODEL, engine="echo", replicas=2, max_adapters=0, cpus_per_replica=0.5)
    with _app(ServeConfig(models=(model,), gateway=GatewayConfig(replicas=gateways)), port):
        yield


@contextlib.contextmanager
def routed(policies: Sequence[str], folder: Path, port: int) -> Iterator[None]:
    """Two engines behind as many gateways as there are policies, each under its name: all of Tandem, routed in several ways.

    The adapters are the folders of `adapters/` beside the model's; `routed.json` there has the served model's other keys.
    """
    from tandem.config import RouterConfig, ServeConfig, ServedModelConfig
    from tandem.registry import Registry
    from tandem.settings import settings

    registry = Registry(settings().registry_url)
    registry.register_model(MODEL, folder)
    for adapter in sorted((folder.parent / "adapters").iterdir()):
        registry.register_adapter(adapter.name, adapter, base=MODEL)
    keys = json.loads((folder.parent / "routed.json").read_text())
    config = ServeConfig(models=(ServedModelConfig(model=MODEL, replicas=2, **keys),))
    with _app(config, port):
        # Ray reads how it authenticates when it is imported: not before there is a cluster.
        from ray import serve

        from tandem.apps.gateway import Gateway
        from tandem.apps.resolve import resolve_models
        from tandem.serve.scaling import GATEWAY_ENVIRONMENT

        directory: Any = serve.get_deployment_handle("Directory", "tandem")
        models = tuple(resolve_models(config, registry))
        for policy in policies:
            gateway: Any = serve.deployment(
                serve.ingress()(Gateway),
                name="Gateway",
                ray_actor_options={
                    "num_cpus": 0.1,
                    "runtime_env": {"env_vars": GATEWAY_ENVIRONMENT},
                },
                max_ongoing_requests=100_000,
            )
            app = gateway.bind(
                directory, models, config.gateway, registry.address, [], router=RouterConfig(policy=policy)
            )
            serve.run(app, name=policy, route_prefix=f"/{policy}")
        yield


@contextlib.contextmanager
def _app(config: Any, port: int) -> Iterator[None]:
    from tandem.cluster.local import local_cluster

    with local_cluster(num_cpus=8) as cluster:
        import ray
        from ray import serve

        from tandem.apps.build import build_app

        ray.init(address=cluster.address, namespace="tandem", log_to_driver=False, logging_level=logging.ERROR)
        # Still connected when its cluster ends, a process dies before it can say what went wrong.
        with contextlib.ExitStack() as exit_stack:
            exit_stack.callback(ray.shutdown)
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
            print(f"KEY {(key := make_key())}", flush=True)
            HEADERS["authorization"] = f"Bearer {key}"
            try:
                serve.run(build_app(config, check=False), name="tandem", route_prefix="/")
            except RuntimeError:
                print(serve.status(), file=sys.stderr)
                raise
            yield


@contextlib.contextmanager
def ray_llm(folder: Path, port: int) -> Iterator[None]:
    """Ray Serve LLM; which mode it runs in is in the environment."""
    import ray
    from ray import serve
    from ray.serve.llm import LLMConfig, build_openai_app

    ray.init(address="local", num_cpus=8, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=True)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    config = LLMConfig(
        model_loading_config={"model_id": MODEL, "model_source": str(folder)},
        deployment_config={"num_replicas": 1},
        engine_kwargs=dict(ARGS),
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm", route_prefix="/")
    yield
    ray.shutdown()


STACKS: dict[str, Callable[[Path, int], contextlib.AbstractContextManager[None]]] = {
    "bare": bare,
    "bare-one": bare_one,
    "tandem": tandem,
    "ray": ray_llm,
    "ray-direct": ray_llm,
    "echo-1": functools.partial(echo, 1),
    "echo-2": functools.partial(echo, 2),
    "routed": functools.partial(routed, ("affinity", "round_robin")),
}


def main() -> None:
    """Serve until stdin closes."""
    name, folder, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with STACKS[name](folder, port):
        body = {"model": MODEL, "prompt": "import os", "max_tokens": 4}
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, headers=HEADERS, timeout=60)
                if answer.status_code == 200:
                    print("READY", flush=True)
                    break
            time.sleep(0.5)
        sys.stdin.read()


if __name__ == "__main__":
    main()
