"""A local cluster ends with its owner, in whatever way the owner ends."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
from commands import cluster_mark, cluster_record, gone

from tandem.cluster.marks import marked_processes
from tandem.settings import child_environment

OWNER = """
import time
from tandem.cluster.local import LocalCluster
LocalCluster.start(num_cpus=2)
print("up", flush=True)
time.sleep(600)
"""


def agents(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those of Ray's processes that have given themselves a name by now."""
    found = []
    for process in family:
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if process.cmdline() and process.cmdline()[0].endswith("Agent"):
                found.append(process)
    return found


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
    head = psutil.Process(json.loads(cluster_record(tmp_path).read_text())["pid"])
    deadline = time.monotonic() + 30
    # The agents rename themselves a while after they start: that is when the mark could get lost.
    try:
        while len(agents(family := head.children(recursive=True))) < 2:
            assert time.monotonic() < deadline, [p.name() for p in family]
            time.sleep(0.2)
        assert {p.pid for p in family} <= {p.pid for p in marked_processes(mark)}
    finally:
        owner.kill()
        owner.wait()
    assert gone(mark) == []
    assert psutil.wait_procs(family, timeout=5)[1] == []
    record = json.loads(cluster_record(tmp_path).read_text())
    assert record["kept"] is False
    # The reaper removes the files when the last process has ended.
    deadline = time.monotonic() + 30
    while Path(record["folder"]).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(record["folder"]).exists()
