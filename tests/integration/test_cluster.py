"""A local cluster ends with its owner, in whatever way the owner ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from commands import cluster_mark, gone

from tandem.cluster import marked
from tandem.settings import child_environment

OWNER = """
import time
from tandem.cluster import LocalCluster
LocalCluster.start(num_cpus=2)
print("up", flush=True)
time.sleep(600)
"""


def test_an_owner_killed_outright_leaves_no_process_of_ray(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=child_environment({"TANDEM_HOME": str(tmp_path), "RAY_ADDRESS": None}),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline().strip() == "up"
    mark = cluster_mark(tmp_path)
    assert len(marked(mark)) > 3
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert gone(mark) == []
    assert json.loads((tmp_path / "cluster.json").read_text())["kept"] is False
