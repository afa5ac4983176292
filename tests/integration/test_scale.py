"""A model that sleeps, wakes for a request, has two replicas under a burst and sleeps again: real Ray Serve, echo engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tandem.apps.build import prepare
from tandem.apps.deploy import deploy
from tandem.config import AutoscalingConfig, ServeConfig, ServedModelConfig

APP = "scaled"
PATIENCE_S = 60.0
WORDS = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def url(serve_port: int) -> Iterator[str]:
    """An app of its own: none to two engines, each of which writes one answer at a time, two words a second."""
    from ray import serve

    scaling = AutoscalingConfig(
        min_replicas=0,
        max_replicas=2,
        target_waiting=1,
        upscale_delay_s=0.5,
        downscale_delay_s=3,
    )
    model = ServedModelConfig(
        model="echo",
        name="echo",
        engine="echo",
        autoscaling=scaling,
        hold_s=PATIENCE_S,
        cpus_per_replica=0.1,
        max_adapters=0,
        engine_args={"delay_s": 0.2, "slots": 1},
    )
    deploy(prepare(ServeConfig(models=(model,), app=APP), check=False), route_prefix=f"/{APP}")
    yield f"http://127.0.0.1:{serve_port}/{APP}"
    serve.delete(APP, _blocking=False)


def ready(url: str) -> int:
    """How many replicas answer, as /health says."""
    answer = httpx.get(f"{url}/health")
    assert answer.status_code == 200, answer.text
    return int(answer.json()["ready_replicas"]["echo"])


def ask(url: str) -> str:
    """An answer: a request that comes while there is no replica is held until there is one."""
    answer = httpx.post(f"{url}/v1/completions", json={"model": "echo", "prompt": WORDS}, timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def wait_for(url: str, replicas: int) -> None:
    """Until so many answer."""
    deadline = time.monotonic() + PATIENCE_S
    while (found := ready(url)) != replicas:
        assert found <= 2 and time.monotonic() < deadline, f"{found} replicas, not {replicas}"
        time.sleep(0.1)


def test_a_model_sleeps_wakes_grows_and_sleeps_again(url: str) -> None:
    assert ready(url) == 0
    assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]] == ["echo"]
    assert ask(url) == WORDS
    with ThreadPoolExecutor(8) as pool:
        over = threading.Event()

        def ask_on() -> set[str]:
            found = set()
            while not over.is_set():
                found.add(ask(url))
            return found

        asking = [pool.submit(ask_on) for _ in range(8)]
        try:
            wait_for(url, 2)
        finally:
            over.set()
        assert [each.result() for each in asking] == [{WORDS}] * 8
    wait_for(url, 0)
    assert ask(url) == WORDS
