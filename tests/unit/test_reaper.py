from __future__ import annotations

import signal
import subprocess
import sys
import time

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
