"""The policy of the config is the one that the served gateway routes by: real Ray and HAProxy, echo engines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serve_fixtures import Served

from tandem.apps.build import build_app
from tandem.config import RouterConfig, ServeConfig, ServedModelConfig

APP = "turns"
WORDS = "one two three four five six seven eight nine ten eleven twelve"


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    """An app of its own beside the session's, with two engines that answer a word each half second."""
    from ray import serve

    model = ServedModelConfig(
        model="echo",
        name="echo",
        engine="echo",
        replicas=2,
        cpus_per_replica=0.1,
        max_adapters=0,
        engine_args={"delay_s": 0.5},
    )
    config = ServeConfig(models=(model,), router=RouterConfig(policy="round_robin"), app=APP)
    serve.run(build_app(config, check=False), name=APP, route_prefix=f"/{APP}")
    yield f"{served.url}/{APP}"
    serve.delete(APP, _blocking=False)


def running() -> list[int]:
    """Requests of each replica, as the directory has them."""
    from ray import serve

    directory = serve.get_deployment_handle("Directory", APP)
    return sorted(replica.running for replica in directory.watch.remote(0).result(timeout_s=30).replicas)


def test_in_turn_one_sessions_requests_are_shared_by_the_replicas(url: str) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/health").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    # The default policy would keep a session at one replica.
    body = {"model": "echo", "prompt": WORDS, "user": "ann"}
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60) for _ in range(6)]
        seen = running()
        while sum(seen) < 6 and not all(answer.done() for answer in asked):
            time.sleep(0.2)
            seen = running()
        assert seen == [3, 3]
        assert [answer.result().status_code for answer in asked] == [200] * 6
