"""One cluster, two jobs: a training run and the served app share its CPUs, and neither takes what is the other's."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ray
from drivers import Driver, write_job
from serve_fixtures import PROMPTS, Served, greedy_tokens

from tandem.batch.run import check_capacity
from tandem.cluster.local import LocalCluster
from tandem.config import ServedModelConfig, TrainConfig, from_dict
from tandem.data.build import build_dataset
from tandem.errors import ClusterError
from tandem.train.launch import check_capacity as check_training

NODE = "node:__internal_head__"
"""A resource that Ray's first node always has: it stands for what an operator names."""


class Client(threading.Thread):
    """Asks the app without a pause, streamed and not, until it is told to end."""

    def __init__(self, served: Served, expected: dict[str, list[int]]) -> None:
        super().__init__(daemon=True)
        self._client, self._expected = served.client(timeout=30.0), expected
        self._over = threading.Event()
        self.answers: list[float] = []
        """When each came."""
        self.failures: list[str] = []

    def run(self) -> None:
        turns = 0
        while not self._over.is_set():
            model, stream = ("tiny", "red")[turns % 2], turns % 3 == 0
            turns += 1
            try:
                said = self._client.completions.create(
                    model=model,
                    prompt=PROMPTS[0],
                    max_tokens=12,
                    temperature=0,
                    stream=stream,
                    extra_body={"return_token_ids": True},
                )
                parts = list(said) if stream else [said]
                tokens = [token for part in parts for choice in part.choices for token in choice.token_ids or ()]
                if tokens != self._expected[model]:
                    self.failures.append(f"{model}: {tokens}")
            except Exception as error:
                self.failures.append(f"{model}: {error!r}")
            self.answers.append(time.monotonic())

    def end(self) -> None:
        self._over.set()
        self.join(60)


@pytest.mark.slow  # a job of 30 steps beside the app
def test_the_app_answers_throughout_a_training_run_on_the_same_cluster(
    served: Served, cluster: LocalCluster, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {n}: the fox jumps over {n % 13} dogs.\n\n" for n in range(200)))
    build_dataset(str(tmp_path / "text.txt"), tmp_path / "data" / "text", vocab_size=300)
    parallel = {"workers": 2, "cpus_per_worker": 1.5, "resources_per_worker": {NODE: 0.25}}
    job = write_job(tmp_path, "beside", parallel=parallel, steps=30)
    expected = {name: greedy_tokens(served.base, served.adapters.get(name), PROMPTS[0], 12) for name in ("tiny", "red")}
    client = Client(served, expected)
    total, before = ray.cluster_resources(), ray.available_resources()
    client.start()
    driver = Driver(job, tmp_path, str(cluster.address))
    try:
        driver.wait_for_step(1)
        began, during = time.monotonic(), ray.available_resources()
        status, events = driver.end()
        ended = time.monotonic()
    finally:
        driver.kill()
        client.end()
    assert status == 0 and events[-1]["event"] == "finished", "".join(driver.lines[-40:])
    # What the workers' config states is theirs, beside what the app holds. Apps of other tests may just be giving CPUs back.
    assert total["CPU"] - during["CPU"] >= 3.0 + 1.0
    assert before[NODE] - during[NODE] >= 0.5
    assert client.failures == []
    assert len(client.answers) > 10 and any(began < at < ended for at in client.answers)


def test_resources_that_the_cluster_never_has_are_refused(ray_cluster: LocalCluster) -> None:
    total = ray.cluster_resources()
    config = from_dict(
        TrainConfig, {"name": "x", "data": {"path": "text"}, "parallel": {"resources_per_worker": {"fast_disk": 1}}}
    )
    with pytest.raises(ClusterError, match="need 1 fast_disk; the whole cluster has 0.*resources_per_worker.fast_disk"):
        check_training(config, total)
    with pytest.raises(ClusterError, match="takes 1 fast_disk; the whole cluster has 0. Lower resources_per_replica"):
        check_capacity(ServedModelConfig(model="x", resources_per_replica={"fast_disk": 1.0}))
    check_capacity(ServedModelConfig(model="x", resources_per_replica={NODE: 0.1}))
