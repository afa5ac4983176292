from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPLICA = """
import multiprocessing, os, subprocess, sys, time
from tandem.reaper import Reaper
if __name__ == "__main__":
    reaper = Reaper.of_children()
    child = subprocess.Popen([sys.executable, "-c", "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)'], start_new_session=True); print(p.pid, flush=True); time.sleep(600)"], stdout=subprocess.PIPE, text=True)
    print(child.pid, child.stdout.readline().strip(), reaper.pid, flush=True)
    time.sleep(600)
"""  # noqa: E501


def test_a_replica_killed_outright_leaves_neither_children_nor_grandchildren() -> None:
    replica = subprocess.Popen([sys.executable, "-c", REPLICA], stdout=subprocess.PIPE, text=True)
    assert replica.stdout is not None
    pids = [int(word) for word in replica.stdout.readline().split()]
    assert len(pids) == 3 and all(psutil.pid_exists(pid) for pid in pids)
    replica.send_signal(signal.SIGKILL)
    replica.wait()
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


OWNER = """
import subprocess, sys, time
from pathlib import Path
from tandem.reaper import Reaper
from tandem.settings import child_environment
reaper = Reaper("A_MARK", sys.argv[1], Path(sys.argv[2]))
code = "import mmap, sys, time; f = open(sys.argv[1], 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code, sys.argv[3]], env=child_environment({"A_MARK": sys.argv[1]}), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""  # noqa: E501


def test_an_owner_killed_outright_leaves_no_folder_and_no_shared_memory(tmp_path: Path) -> None:
    folder, shared = tmp_path / "cluster", Path("/dev/shm") / f"tandem-test-{os.getpid()}"
    other = shared.with_name(f"{shared.name}-other")
    other.touch()
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    try:
        owner = subprocess.Popen(
            [sys.executable, "-c", OWNER, f"mark-{os.getpid()}", str(folder), str(shared)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        assert shared.exists()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        deadline = time.monotonic() + 30
        while (folder.exists() or alive(child)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(child) and not folder.exists() and not shared.exists()
        assert other.exists()
    finally:
        shared.unlink(missing_ok=True)
        other.unlink()
