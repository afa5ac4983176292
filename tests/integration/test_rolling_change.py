"""Whatever changes in what is served, no request fails and each stream runs to its end: real Ray and HAProxy, echo engines."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from serve_fixtures import process_of
from steady_load import SteadyLoad

from tandem.apps.build import prepare
from tandem.apps.deploy import deploy, saved_config
from tandem.config import GatewayConfig, ServeConfig, ServedModelConfig, apply_overrides, from_dict, to_dict
from tandem.errors import EngineError
from tandem.routing.records import ReplicaRecord

APP = "changing"
CHANGED_S = 60.0
OUTLASTING_WORDS = 450
"""A stream of so many goes on for longer than a directory takes anybody's silence, after the change."""
PARROT = ServedModelConfig(
    model="parrot@1",
    name="parrot",
    engine="echo",
    cpus_per_replica=0.1,
    max_adapters=0,
    engine_args={"delay_s": 0.05},
)
CONFIG = ServeConfig(models=(PARROT,), app=APP, drain_timeout_s=60.0)


def put(config: ServeConfig) -> None:
    """Serve this from now on."""
    began = time.monotonic()
    deploy(prepare(config, check=False), route_prefix=f"/{APP}")
    print("put", time.monotonic() - began)


def replicas() -> dict[str, ReplicaRecord]:
    """The engine replicas that are ready."""
    from ray import serve

    directory = serve.get_deployment_handle("Directory", APP)
    found = directory.watch.remote(0).result(timeout_s=30).replicas
    return {replica.id: replica for replica in found if replica.state == "ready"}


def gateways() -> set[int]:
    """The processes of the gateways that Serve counts as running."""
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()["applications"][APP]["deployments"]["Gateway"]["replicas"]
    return {each["pid"] for each in details if each["state"] == "RUNNING"}


@pytest.fixture(scope="module")
def url(serve_port: int) -> Iterator[str]:
    """An app of its own, one engine and one gateway, below `/changing`."""
    from ray import serve

    put(CONFIG)
    found = f"http://127.0.0.1:{serve_port}/{APP}"
    wait_for(lambda: httpx.get(f"{found}/health").status_code == 200)
    yield found
    serve.delete(APP, _blocking=False)


def wait_for(done: object) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + CHANGED_S
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def ready_beside(old: set[str]) -> bool:
    """Whether the ready replicas are others than these."""
    found = set(replicas())
    return bool(found) and not found & old


def test_the_same_config_again_replaces_nothing(url: str) -> None:
    before, doors = set(replicas()), gateways()
    put(CONFIG)
    assert set(replicas()) == before and gateways() == doors


def test_a_change_of_a_remembered_app_starts_from_what_runs(url: str) -> None:
    put(CONFIG)
    before = set(replicas())
    running = saved_config(APP)
    assert running == CONFIG
    # What `tandem serve deploy --set gateway.replicas=2` does.
    put(from_dict(ServeConfig, apply_overrides(to_dict(running), ["gateway.replicas=2"])))
    # The gateway is replaced too: each has its share of what may wait.
    wait_for(lambda: len(gateways()) == 2)
    assert set(replicas()) == before
    assert saved_config("another") is None


def test_engine_settings_change_under_load(url: str) -> None:
    old = set(replicas())
    with SteadyLoad(url, "parrot") as load:
        load.wait_for(4)
        # An engine that takes its time to start: an old one that ended first would be missed.
        put(replace(CONFIG, models=(replace(PARROT, engine_args={"delay_s": 0.04, "start_s": 4.0}),)))
        wait_for(lambda: ready_beside(old))
        load.wait_for(8)
        load.stop()
    assert not load.failed
    assert set(load.answered) == {"parrot@1"}


def test_a_new_version_of_the_model_takes_over_under_load(url: str) -> None:
    asked = {"model": "parrot", "prompt": " ".join(["word"] * OUTLASTING_WORDS), "stream": True}
    with ThreadPoolExecutor(1) as pool, SteadyLoad(url, "parrot") as load:
        load.wait_for(4)
        outlasting = pool.submit(httpx.post, f"{url}/v1/completions", json=asked, timeout=60)
        put(replace(CONFIG, models=(replace(PARROT, model="parrot@2"),)))
        load.wait_for(8, "parrot@2")
        wait_for(lambda: {replica.pool for replica in replicas().values()} == {"parrot@2"})
        before = load.answered["parrot@1"]
        load.wait_for(16)
        load.stop()
        text = outlasting.result().text
    assert text.endswith("data: [DONE]\n\n") and text.count("data: {") == OUTLASTING_WORDS
    assert not load.failed
    # What was streaming from the old one when the new one came may have ended since, and nothing else.
    assert load.answered["parrot@1"] - before <= 8


@pytest.mark.slow  # streams run on while replicas change, one after another
def test_new_code_replaces_everything_under_load(url: str) -> None:
    old, doors = set(replicas()), gateways()
    with SteadyLoad(url, "parrot") as load:
        load.wait_for(4)
        put(replace(CONFIG, version="of another day"))
        wait_for(lambda: ready_beside(old))
        wait_for(lambda: gateways() and not gateways() & doors)
        load.wait_for(8)
        load.stop()
    assert not load.failed


@pytest.mark.slow  # streams run on while replicas change, one after another
def test_one_of_two_gateways_and_one_of_two_engines_get_a_sigterm_under_load(url: str) -> None:
    put(replace(CONFIG, gateway=GatewayConfig(replicas=2), models=(replace(PARROT, replicas=2),)))
    wait_for(lambda: len(gateways()) == 2 and len(replicas()) == 2)
    doors, engines = gateways(), replicas()
    gateway, engine = min(doors), engines[min(engines)]
    with SteadyLoad(url, "parrot") as load:
        load.wait_for(4)
        os.kill(gateway, signal.SIGTERM)
        os.kill(process_of(engine).pid, signal.SIGTERM)
        wait_for(lambda: engine.id not in replicas() and len(replicas()) == 2)
        wait_for(lambda: gateway not in gateways() and len(gateways()) == 2)
        load.wait_for(8)
        load.stop()
    assert not load.failed


@pytest.mark.slow  # streams run on while replicas change, one after another
def test_settings_with_which_no_replica_starts_leave_what_is_served_as_it_was(url: str) -> None:
    with SteadyLoad(url, "parrot") as load:
        load.wait_for(4)
        old = set(replicas())
        with pytest.raises(EngineError, match="nonsense"):
            put(replace(CONFIG, models=(replace(PARROT, engine_args={"nonsense": 1}),)))
        assert old & set(replicas())
        load.wait_for(8)
        put(CONFIG)
        load.wait_for(4, "parrot@1")
        load.stop()
    assert not load.failed
