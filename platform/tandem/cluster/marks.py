"""Marked processes: the environment of every process of a local cluster or node carries its mark, by which all are found."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

from tandem.cluster.reaper import remove_shared_memory, shared_memory

MARK = "TANDEM_CLUSTER_MARK"


def end_marked(mark: str, grace_s: float = 4.0) -> None:
    """End every process whose environment carries `mark`: SIGTERM first, SIGKILL after `grace_s`.

    Also removes the shared memory that libraries created in them after the first of these processes started.
    """
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    shared: set[str] = set()
    started_s = time.time()
    while processes := marked(mark):
        force = time.monotonic() > deadline
        for process in processes:
            shared |= shared_memory(process.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                started_s = min(started_s, process.create_time())
            if force or process.pid not in asked:
                asked.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL if force else signal.SIGTERM)
        psutil.wait_procs(processes, timeout=0.3)
        if time.monotonic() > deadline + grace_s:
            break
    if shared:
        remove_shared_memory(shared, started_s)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes, other than this one, whose environment carries `mark`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found
