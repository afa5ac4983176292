"""For test_two_nodes.py: a Ray cluster of two nodes in which training is launched; prints what came of it.

python two_nodes.py TOKENIZER FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tandem import settings as environment
from tandem.cluster.local import authentication

environment.export(authentication())
environment.export({"RAY_TRAIN_V2_ENABLED": "1"})

import ray  # noqa: E402 - it reads the environment when it is imported
from ray.cluster_utils import Cluster  # noqa: E402

from tandem.config import CheckpointConfig, DataConfig, ModelConfig, ParallelismConfig, TrainConfig  # noqa: E402
from tandem.errors import LayoutError  # noqa: E402
from tandem.observability.journal import Journal  # noqa: E402
from tandem.train.supervision.attempts import run_workers  # noqa: E402
from tandem.train.task import WorkerTask  # noqa: E402


class Rows:
    """A stream of nothing but the first tokens."""

    def rows(self, rank: int, ranks: int, cursor: Any, **how: Any) -> Any:
        import numpy as np

        def take(count: int) -> Any:
            found = np.ones((count, 3, 16), np.int32)
            found[:, 2] = np.arange(16)
            return found

        return SimpleNamespace(take=take, cursor=dict, close=lambda: None)


def main(tokenizer: Path, home: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=3)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        # A node has room for three workers of one CPU, or for two of one and a half.
        for cpus in (1.0, 1.5):
            print(cpus, outcome(tokenizer, home / f"job-{cpus}", cpus), flush=True)
    finally:
        ray.shutdown()
        cluster.shutdown()


def outcome(tokenizer: Path, job: Path, cpus_per_worker: float) -> str:
    job.mkdir()
    config = TrainConfig(
        name="n",
        data=DataConfig(path="x", sequence_length=16),
        model=ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16),
        parallel=ParallelismConfig(workers=4, tensor=2, cpus_per_worker=cpus_per_worker),
        checkpoint=CheckpointConfig(max_failures=0),
        steps=1,
        batch_size=2,
    )
    task = WorkerTask(
        config=config, job=job, base=None, base_id=None, reference=None, tokenizer=tokenizer,
        stream=Rows(), evaluation=None,
    )  # type: ignore[arg-type]  # fmt: skip
    metrics: Any = SimpleNamespace(write=lambda event: None)
    try:
        end = run_workers(task, Journal(job / "events.jsonl"), metrics)
        return f"TRAINED {end['step']}"
    except LayoutError as error:
        return f"REFUSED {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
