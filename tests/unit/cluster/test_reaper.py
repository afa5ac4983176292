from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tandem.cluster.marks import MARK, end_marked_processes
from tandem.settings import child_environment

REPLICA = """
import multiprocessing, os, subprocess, sys, time
from tandem.cluster.reaper import Reaper
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


MAPS_FILES = """
import mmap, sys, time
files = [open(path, "a+b") for path in sys.argv[1:]]
for file in files:
    if not file.tell():
        file.truncate(4096)
maps = [mmap.mmap(file.fileno(), 0) for file in files]
print("up", flush=True)
time.sleep(600)
"""
OWNER = """
import subprocess, sys, time
from pathlib import Path
from tandem.cluster.reaper import Reaper
from tandem.settings import child_environment
reaper = Reaper("A_MARK", sys.argv[1], Path(sys.argv[2]))
child = subprocess.Popen([sys.executable, "-c", sys.argv[3], *sys.argv[4:]], env=child_environment({"A_MARK": sys.argv[1]}), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""  # noqa: E501


@pytest.fixture
def data() -> Iterator[tuple[Path, list[Path]]]:
    """A path for a library's shared memory, and files of the user's in /dev/shm: in a folder, with other names, and older."""
    name = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    library, folder = Path(f"/dev/shm/psm_{name}"), Path(f"/dev/shm/tandem-{name}")
    folder.mkdir()
    old = Path(f"/dev/shm/torch_{name}-old")
    files = [folder / "tandem.db", folder / "psm_rows", Path(f"/dev/shm/dataset-{name}"), old]
    for file in files:
        file.write_bytes(b"rows")
    an_hour_ago = time.time() - 3600
    os.utime(old, (an_hour_ago, an_hour_ago))
    yield library, files
    library.unlink(missing_ok=True)
    for file in files:
        file.unlink(missing_ok=True)
    folder.rmdir()


def test_an_owner_killed_outright_leaves_no_folder_and_no_shared_memory(
    tmp_path: Path, data: tuple[Path, list[Path]]
) -> None:
    shared, user_files = data
    folder = tmp_path / "cluster"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "file").touch()
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, shared.name, str(folder), MAPS_FILES, *map(str, (shared, *user_files))],
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
    assert [file for file in user_files if not file.exists()] == []


def test_ending_a_cluster_removes_shared_memory_of_libraries_and_keeps_mapped_files_of_the_user(
    data: tuple[Path, list[Path]],
) -> None:
    shared, user_files = data
    process = subprocess.Popen(
        [sys.executable, "-c", MAPS_FILES, *map(str, (shared, *user_files))],
        env=child_environment({MARK: shared.name}),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    end_marked_processes(shared.name)
    assert not alive(process.pid) and not shared.exists()
    assert [file for file in user_files if not file.exists()] == []
