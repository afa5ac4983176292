"""For test_node_health.py: a Ray cluster of three nodes, one of which is cordoned; prints a JSON line about each step.

python cordoned_nodes.py TOKENIZER FOLDER    (TANDEM_HOME is set)
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tandem import settings as environment
from tandem.cluster.local import authentication

environment.export(authentication())
environment.export({"RAY_TRAIN_V2_ENABLED": "1"})

import ray  # noqa: E402 - it reads the environment when it is imported
from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.serve.context import _get_global_client  # noqa: E402

from tandem.apps.build import missing_on_nodes, prepare  # noqa: E402
from tandem.apps.deploy import deploy  # noqa: E402
from tandem.cluster.health.cordons import placement_selector  # noqa: E402
from tandem.cluster.ports import free_ports  # noqa: E402
from tandem.config import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelismConfig,
    ServeConfig,
    TrainConfig,
    from_dict,
)
from tandem.observability.journal import Journal  # noqa: E402
from tandem.train.supervision.attempts import run_workers  # noqa: E402
from tandem.train.task import WorkerTask  # noqa: E402

APP = {"models": [{"model": "echo", "name": "echo", "engine": "echo", "replicas": 4, "cpus_per_replica": 0.1}]}


class Rows:
    """A stream of nothing but the first tokens, which notes the node of each rank."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rows(self, rank: int, ranks: int, cursor: Any, **how: Any) -> Any:
        import numpy as np

        (self.folder / f"rank-{rank}").write_text(ray.get_runtime_context().get_node_id())

        def take(count: int) -> Any:
            found = np.ones((count, 3, 16), np.int32)
            found[:, 2] = np.arange(16)
            return found

        return SimpleNamespace(take=take, cursor=dict, close=lambda: None)


class Here:
    """A worker of Ray Data that tells its node."""

    def __call__(self, rows: Any) -> Any:
        import numpy as np

        return {"node": np.array([ray.get_runtime_context().get_node_id()] * len(rows["id"]))}


def main(tokenizer: Path, folder: Path) -> None:
    # Commands find a cluster by its dashboard.
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_ports(1)[0]}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        others = [cluster.add_node(num_cpus=3).node_id for _ in range(2)]
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        serve.start(http_options={"host": "127.0.0.1", "port": free_ports(1)[0]}, proxy_location="HeadOnly")
        say("doctor", tandem(cluster.address, "doctor", "--cluster", "--json"))
        say("missing", missing_on_nodes(prepare(from_dict(ServeConfig, APP), check=False)))
        before = [trained(tokenizer, folder / "before"), served()]
        say("before", before)
        # The node that the workers were packed on.
        out = max(others, key=before[0].count)
        say("cordon", [out, tandem(cluster.address, "cluster", "cordon", out[:12], "--reason", "a test")])
        say("after", [trained(tokenizer, folder / "after"), served(), of_data()])
        say("doctor", tandem(cluster.address, "doctor", "--cluster", "--json"))
        say("uncordon", tandem(cluster.address, "cluster", "uncordon", out[:12]))
        say("again", [served(), placement_selector()])
        drained = others[1 - others.index(out)]
        say("drain", [drained, tandem(cluster.address, "cluster", "cordon", drained, "--drain", "--deadline-s", "600")])
    finally:
        ray.shutdown()
        cluster.shutdown()


def say(step: str, value: Any) -> None:
    print(json.dumps({"step": step, "value": value}), flush=True)


def tandem(address: str, *arguments: str) -> tuple[int, str]:
    """Status and output of a command."""
    done = subprocess.run(
        [sys.executable, "-m", "tandem", *arguments],
        env=environment.child_environment({"RAY_ADDRESS": address, "COLUMNS": "200"}),
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout + done.stderr


def served() -> list[str]:
    """Deploy the app; nodes of all its replicas once none of an earlier deployment is left."""
    config = from_dict(ServeConfig, {**APP, "drain_timeout_s": 1})
    deploy(prepare(config, check=False))
    while True:
        client = _get_global_client()
        assert client is not None
        deployments = client.get_serve_details()["applications"][config.app]["deployments"].values()
        replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
        if all(replica["state"] == "RUNNING" for replica in replicas):
            return [replica["node_id"] for replica in replicas]


def of_data() -> list[str]:
    """Nodes of the workers of Ray Data, placed as those of a batch run are."""
    rows = ray.data.range(8, override_num_blocks=4).map_batches(
        Here,
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=2),
        num_cpus=0.5,
        label_selector=placement_selector() or None,
    )
    return sorted({row["node"] for row in rows.take_all()})


def trained(tokenizer: Path, job: Path) -> list[str]:
    """Node of each rank of a training run of one step."""
    job.mkdir()
    config = TrainConfig(
        name="n",
        data=DataConfig(path="x", sequence_length=16),
        model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16),
        parallel=ParallelismConfig(workers=2),
        checkpoint=CheckpointConfig(max_failures=0),
        steps=1,
        batch_size=2,
    )
    task = WorkerTask(
        config=config, job=job, base=None, base_id=None, reference=None, tokenizer=tokenizer,
        stream=Rows(job), evaluation=None,
    )  # type: ignore[arg-type]  # fmt: skip
    metrics: Any = SimpleNamespace(write=lambda event: None)
    run_workers(task, Journal(job / "events.jsonl"), metrics)
    return [(job / f"rank-{rank}").read_text() for rank in range(2)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
