"""Training and serving on one cluster: a burst takes a worker of an elastic run, which gets it back. Real Ray and Ray Serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from drivers import Driver, losses, write_job

from tandem.apps.build import prepare
from tandem.apps.deploy import deploy
from tandem.cluster.local import LocalCluster
from tandem.config import AutoscalingConfig, SchedulingConfig, ServeConfig, ServedModelConfig
from tandem.data.build import build_dataset
from tandem.jobs.folder import JobFolder
from tandem.jobs.folder_jobs import folder_submission
from tandem.jobs.work.states import State
from tandem.jobs.work.store import JobStore
from tandem.observability.events import ResizeRequested
from tandem.registry import Registry

APP = "shared"
TIMEOUT_S = 400.0
WORDS = "one two three four five six seven eight nine ten"
STEPS = 1200
"""Two minutes or more: the run has not ended when the burst is over and its worker is back."""
MODEL = {
    "hidden_size": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 256, "max_length": 64,
}  # fmt: skip


def share_of_cpus() -> float:
    """CPUs of a worker and of a replica: two workers fit beside one replica, and one worker beside two."""
    return round(ray.available_resources().get("CPU", 0.0) / 3.6, 2)


@pytest.fixture(scope="module")
def data(session_home: Path) -> Path:
    text = session_home / "scheduled.txt"
    text.write_text("".join(f"Line {n}: the fox jumps over {n * 7 % 13} lazy dogs.\n\n" for n in range(400)))
    folder = session_home / "data" / "scheduled"
    build_dataset(str(text), folder, vocab_size=300)
    return folder


@pytest.fixture(scope="module")
def cpus(ray_cluster: LocalCluster) -> float:
    return share_of_cpus()


@pytest.fixture(scope="module")
def url(serve_port: int, session_home: Path, cpus: float) -> Iterator[str]:
    """An app of one or two engines, each of which writes one answer at a time."""
    from ray import serve

    model = ServedModelConfig(
        model="echo",
        name="echo",
        engine="echo",
        autoscaling=AutoscalingConfig(max_replicas=2, target_waiting=1, upscale_delay_s=0.5, downscale_delay_s=5),
        cpus_per_replica=cpus,
        max_adapters=0,
        engine_args={"delay_s": 0.2, "slots": 1},
    )
    config = ServeConfig(models=(model,), app=APP, scheduling=SchedulingConfig(min_run_s=10.0))
    deploy(prepare(config, check=False), route_prefix=f"/{APP}")
    yield f"http://127.0.0.1:{serve_port}/{APP}"
    serve.delete(APP, _blocking=True)


def wait_for(look: Callable[[], Any], description: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not look():
        assert time.monotonic() < deadline, f"{description} did not happen within {TIMEOUT_S:g} s"
        time.sleep(0.5)


def ready_replicas(url: str) -> int:
    return int(httpx.get(f"{url}/health").json()["ready_replicas"]["echo"])


@pytest.mark.slow  # two training runs of minutes, and an app that scales
@pytest.mark.timeout(1500)
def test_a_burst_of_traffic_takes_a_worker_of_an_elastic_run_which_gets_it_back(
    url: str, session_home: Path, data: Path, cpus: float, ray_cluster: LocalCluster
) -> None:
    run: dict[str, Any] = {
        "data": {"path": str(data), "sequence_length": 32},
        "model": MODEL,
        "steps": STEPS,
        "batch_size": 16,
        # Small, so that rounding does not grow over the steps.
        "optimizer": {"learning_rate": 1e-5},
        "checkpoint": {"every_steps": 50},
    }
    elastic = {"workers": {"min": 1, "max": 2}, "cpus_per_worker": cpus}
    job = JobFolder(write_job(session_home, "shared-elastic-1", **run, parallel=elastic))
    with Registry.open() as registry:
        store = JobStore.at(registry.address)
    submitted = store.submit(folder_submission(job)).job

    def workers() -> int | None:
        current = store.get(submitted.id)
        assert not current.state.ended, (current.state, current.error)
        return current.workers if current.state is State.RUNNING else None

    wait_for(lambda: workers() == 2 and job.summary().step >= 10, "a run with two workers")
    with ThreadPoolExecutor(8) as pool:
        bursting = [True]

        def ask() -> None:
            body = {"model": "echo", "prompt": WORDS}
            while bursting[0]:
                assert httpx.post(f"{url}/v1/completions", json=body, timeout=60.0).status_code == 200

        asking = [pool.submit(ask) for _ in range(8)]
        try:
            wait_for(lambda: ready_replicas(url) == 2, "a second replica")
            step = job.summary().step
            wait_for(lambda: workers() == 1 and job.summary().step > step, "steps of a run with one worker")
        finally:
            bursting[0] = False
        for answer in asking:
            answer.result()
    wait_for(lambda: ready_replicas(url) == 1, "the end of the second replica")
    wait_for(lambda: workers() == 2, "a run with two workers again")
    wait_for(lambda: store.get(submitted.id).state.ended, "the end of the run")
    ended = store.get(submitted.id)
    assert (ended.state, ended.attempt, ended.failures) == (State.FINISHED, 3, 0)
    resizes = [each.event for each in store.events(submitted.id) if isinstance(each.event, ResizeRequested)]
    assert [each.workers for each in resizes] == [1, 2]
    alone = Driver(write_job(session_home, "shared-alone-1", **run), session_home, ray_cluster.address)
    status, _ = alone.end()
    assert status == 0, "".join(alone.lines[-60:])
    # The sums of gradients differ in their order while there is one worker.
    assert losses(job.path) == pytest.approx(losses(alone.job), abs=1e-3)
    store.close()
