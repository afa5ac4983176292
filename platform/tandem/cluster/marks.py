"""Marked processes: the environment of every process of a local cluster or node has its mark, by which they are found."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from tandem.cluster.reaper import remove_shared_memory, shared_memory

MARK = "TANDEM_CLUSTER_MARK"


def end_marked_processes(mark: str, grace_s: float = 4.0) -> None:
    """End every process whose environment carries `mark`: SIGTERM first, SIGKILL after `grace_s`.

    Also removes the shared memory that libraries created in them after the first of these processes started.
    """
    deadline = time.monotonic() + grace_s
    terminated_pids: set[int] = set()
    shared_files: set[str] = set()
    started_s = time.time()
    while processes := marked_processes(mark):
        force = time.monotonic() > deadline
        for process in processes:
            shared_files |= shared_memory(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                started_s = min(started_s, process.create_time())
            if force or process.pid not in terminated_pids:
                terminated_pids.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if force else signal.SIGTERM)
        psutil.wait_procs(processes, timeout=0.3)
        if time.monotonic() > deadline + grace_s:
            break
    if shared_files:
        remove_shared_memory(shared_files, started_s)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes, other than this one, whose environment carries `mark`."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark:
                processes.append(process)
    return processes
