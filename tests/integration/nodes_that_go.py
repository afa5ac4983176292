"""For test_faults.py: a Ray cluster of which a node is killed while a job trains, and comes back; or is taken away after notice.

python nodes_that_go.py HOME STEPS elastic|fixed|drained
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tandem import settings as environment
from tandem.cluster.local import authentication

environment.export(authentication())

import ray  # noqa: E402 - it reads the environment when it is imported
from drivers import Driver, write_job  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402


def main(home: Path, steps: int, name: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        changes: dict[str, Any] = {}
        if name == "elastic":
            # Steps take long enough for a node to come back meanwhile; it changes no loss.
            shutil.copytree(home / "data" / "text", home / "data" / "measured")
            changes["evaluation"] = {"every_steps": 1, "data": str(home / "data" / "measured"), "rows": 48}
        job = write_job(
            home, name, steps=steps, checkpoint={"every_steps": 10, "asynchronous": False}, **changes,
            parallel={"workers": 4 if name == "fixed" else {"min": 2, "max": 4}},
            faults={"grow_after_s": 1.0, "heartbeat_s": 0.5, "hang_after_s": 20.0},
        )  # fmt: skip
        driver = Driver(job, home, cluster.address)
        try:
            driver.wait_for(lambda e: e["event"] == "checkpoint")
            driver.wait_for_step(12)
            if name == "drained":
                drain(cluster, node)
                driver.wait_for(lambda e: e["event"] == "resized")
            cluster.remove_node(node, allow_graceful=False)
            if name != "drained":
                driver.wait_for(lambda e: e["event"] == ("fault" if name == "fixed" else "resized"))
                cluster.add_node(num_cpus=2)
            status, left = driver.end()
            print(name, status, [e for e in left if e["event"] not in ("step", "evaluation")], flush=True)
            print("".join(line for line in driver.lines[-80:] if '"event": "step"' not in line), flush=True)
        finally:
            driver.kill()
    finally:
        ray.shutdown()
        cluster.shutdown()


def drain(cluster: Cluster, node: Any) -> None:
    """Tell Ray that a node will be taken away in a minute, as an autoscaler does."""
    from ray.core.generated import autoscaler_pb2

    taken, why = ray._raylet.GcsClient(address=cluster.address).drain_node(
        node.node_id,
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "it is wanted elsewhere",
        int(1000 * (time.time() + 60)),
    )
    assert taken, why


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
