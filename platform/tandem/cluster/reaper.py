"""Reaper: a watcher process that ends all processes of an owner after the owner has ended.

An owner that is killed with SIGKILL cannot end what it started. So it starts one small process first, which waits on a pipe;
when the pipe closes, because the owner is gone in whatever way, that process kills every other that carries a mark in its
environment, and removes their folder and what libraries created for them in shared memory. Engine replicas use it for vLLM's
processes, and local clusters for all of Ray.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from tandem import settings

CHILDREN_MARK_VARIABLE = "TANDEM_CHILDREN_MARK"
"""Environment variable that holds the mark of `Reaper.of_children`."""
KEEP_MARKS = {"SPT_NOENV": "1"}
"""Set with every mark: otherwise setproctitle, which Ray and vLLM call, overwrites the environment of the process."""


SHARED_MEMORY_PREFIXES = (
    "psm_",  # multiprocessing.shared_memory: vLLM's message queues
    "sem.",  # POSIX semaphores: multiprocessing, Ray's mutable objects
    "pym-",  # multiprocessing's heap
    "torch_",
    "plasma",  # Ray's object store
    "vllm_dist_",  # vLLM's collectives on CPUs
    "VLLM_OBJECT_STORAGE_SHM_BUFFER",
    "nccl-",
    "deepspeed_allreduce_buffer",
    "__KMP_REGISTERED_LIB_",  # Intel's OpenMP
)
"""Prefixes of the files that Ray, vLLM, torch, DeepSpeed and multiprocessing create in /dev/shm."""


def shared_memory(pid: int) -> set[str]:
    """Files directly in /dev/shm, with names of SHARED_MEMORY_PREFIXES, that a process has mapped or open.

    Empty for a process that has ended. Files in subfolders and files with other names are the user's data.
    """
    paths: set[str] = set()
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/maps") as maps:
            paths |= {line.split(maxsplit=5)[5].strip() for line in maps if "/dev/shm/" in line}
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                paths.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {
        path
        for path in paths
        if os.path.dirname(path) == "/dev/shm"
        and os.path.basename(path).startswith(SHARED_MEMORY_PREFIXES)
        and not path.endswith(" (deleted)")
    }


def remove_shared_memory(paths: Iterable[str], since_s: float) -> None:
    """Remove those of these files that are this user's, were created after `since_s` and are in use by no living process.

    `since_s` is in seconds since 1970. A file counts as created before that if any of its three times is earlier, since Linux
    gives no time of creation here.
    """
    mapped_paths = {path for name in os.listdir("/proc") if name.isdigit() for path in shared_memory(int(name))}
    for path in set(paths) - mapped_paths:
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            created = min(status.st_atime, status.st_mtime, status.st_ctime)
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and created >= since_s:
                os.unlink(path)


# Standard library only, and isolated: it starts in 20 ms and holds 8 MB. Reading /proc makes it Linux only.
_WATCH = f"""
from __future__ import annotations
import contextlib, os, signal, stat, sys, time

SHARED_MEMORY_PREFIXES = {SHARED_MEMORY_PREFIXES!r}

{inspect.getsource(shared_memory)}

{inspect.getsource(remove_shared_memory)}

mark, folder, since_s = sys.argv[1].encode(), sys.argv[2], float(sys.argv[3])
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.buffer.read()
def marked():
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                with open(f"/proc/{{name}}/environ", "rb") as file:
                    if mark in file.read().split(b"\\0"):
                        yield int(name)
            except OSError:
                pass
shared = set()
for attempt in range(50):
    found = list(marked())
    for pid in found:
        shared |= shared_memory(pid)
    # What the dying owner still ends by itself gets half a second for it.
    if attempt >= 5:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
    if not found:
        break
    time.sleep(0.1)
if shared:
    remove_shared_memory(shared, since_s)
if folder and os.path.isdir(folder) and not os.path.islink(folder) and os.lstat(folder).st_uid == os.geteuid():
    import shutil
    shutil.rmtree(folder, ignore_errors=True)
"""


class Reaper:
    """Watches, from its creation on, over every process whose environment has `variable` set to `value`."""

    def __init__(self, variable: str, value: str, folder: Path | None = None) -> None:
        """`folder` is removed with all that it holds when the last of them has ended."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _WATCH, f"{variable}={value}", str(folder or ""), repr(time.time())],
            stdin=subprocess.PIPE,
            env=settings.child_environment({variable: None}),
            start_new_session=True,
        )

    @classmethod
    def of_children(cls) -> Reaper:
        """A watch over all that this process starts from now on."""
        mark = secrets.token_hex(8)
        # In this process's environment as it is now (not as it started): children inherit it, the kernel's copy of our
        # own environment does not show it, so the reaper never takes its owner.
        settings.export({CHILDREN_MARK_VARIABLE: mark, **KEEP_MARKS}, override=True)
        return cls(CHILDREN_MARK_VARIABLE, mark)

    @property
    def pid(self) -> int:
        """Process id of the watcher."""
        return self._process.pid

    def close(self) -> None:
        """End the watch, and every child that still runs."""
        pipe: IO[bytes] | None = self._process.stdin
        if pipe is not None and not pipe.closed:
            pipe.close()
