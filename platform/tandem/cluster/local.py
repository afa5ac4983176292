"""Ray clusters: the one at RAY_ADDRESS, or a local one that this process starts and removes completely.

A local cluster is `ray start --head --block` in a process group of its own, on ports that are free, behind a token. Every process
that descends from it has a mark in its environment; stopping ends all processes with the mark, including those that outlived
their parent. If this process dies first, a reaper does the same.

Its files lie below one private folder, and all that it listens on is loopback (docs/adr/0021-private-files.md).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tandem import settings as environment
from tandem.cluster import haproxy
from tandem.cluster.marks import MARK, end_marked_processes, marked_processes
from tandem.cluster.ports import free_block, free_ports
from tandem.cluster.reaper import KEEP_MARKS, Reaper
from tandem.errors import ClusterError, UnsafePathError
from tandem.private import (
    check_home,
    check_private_folder,
    make_private_folder,
    make_temporary_folder,
    read_private_file,
    remove_private_folder,
)
from tandem.storage import write_atomic

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray use 127.0.0.1 as the node's address. Otherwise it replaces a loopback address by that of the network interface, and
listens on all interfaces."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster that jobs and apps can be sent to."""

    dashboard_url: str
    """`http://host:port` of its dashboard, which takes jobs."""
    address: str | None = None
    """`host:port` that `ray.init` takes; unknown for a cluster that is only reached through its dashboard."""
    local: bool = False
    """Whether it runs on this machine, with this environment's Python."""
    owned: bool = False
    """Whether this process started it, and so ends it."""

    def stop(self) -> None:
        """End it, if this process started it."""


@dataclass(frozen=True, kw_only=True)
class LocalCluster(Cluster):
    """A Ray cluster on this machine, which runs until its owner stops it."""

    mark: str
    folder: Path
    pid: int
    local: bool = True
    reaper: Reaper | None = field(default=None, repr=False, compare=False)
    """Ends the cluster if this process cannot."""
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Environment variables that a process needs to connect to the cluster."""

    @classmethod
    def start(
        cls, *, num_cpus: int | None = None, num_gpus: int | None = None, keep: bool = False, timeout_s: float = 90.0
    ) -> LocalCluster:
        """Start a cluster with `num_cpus` logical CPUs (default: the machine's, and at least 8).

        `keep` lets it outlive this process. Raises ClusterError with the end of Ray's output if it does not come up, and
        UnsafePathError if other users can write in TANDEM_HOME.
        """
        check_home(environment.settings().root)
        _remove_dead_cluster()
        mark = secrets.token_hex(8)
        folder = make_temporary_folder("tandem-")
        temporary = folder / "tmp"
        temporary.mkdir(mode=0o700)
        ports = free_ports(9)
        address, dashboard = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        variables = {
            **haproxy.serving_environment(folder, ports[5:9], free_block()),
            **authentication(),
            **KEEP_MARKS,
            **LOOPBACK,
            MARK: mark,
        }
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--port={ports[0]}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}", f"--metrics-export-port={ports[3]}",
            f"--ray-client-server-port={ports[4]}", f"--temp-dir={folder / 'ray'}",
            f"--num-cpus={num_cpus or max(8, os.cpu_count() or 1)}",
            f"--object-store-memory={object_store_bytes()}",
        ]  # fmt: skip
        if num_gpus is not None:
            command.append(f"--num-gpus={num_gpus}")
        log = (folder / "start.log").open("wb")
        reaper = None if keep else Reaper(MARK, mark, folder)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Sockets and scratch files of vLLM, torch and multiprocessing too are private then, and go with the cluster.
            env=environment.child_environment({**variables, "RAY_ADDRESS": None, "TMPDIR": str(temporary)}),
            # Ctrl-C must reach this process only, which then stops Ray. A kept cluster leaves the terminal's session. Any other
            # stays in it: Linux schedules sessions as groups, and a client in another session than a cluster that uses every
            # core was measured to wait for a core for a second at a time.
            start_new_session=keep,
            process_group=None if keep else 0,
        )
        log.close()
        cluster = cls(
            address=address,
            dashboard_url=dashboard,
            mark=mark,
            folder=folder,
            pid=process.pid,
            owned=True,
            reaper=reaper,
            environment=variables,
        )
        try:
            cluster._wait(process, timeout_s)
            cluster._export_environment()
            record = {"pid": cluster.pid, "kept": keep, "dashboard_url": dashboard, "address": address}
            content = json.dumps({**record, "folder": str(folder), "environment": variables})
            write_atomic(record_path(), content, mode=0o600)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _wait(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not dashboard_answers(self.dashboard_url, self.environment.get("RAY_AUTH_TOKEN_PATH")):
            if process.poll() is not None or time.monotonic() > deadline:
                last_lines = (self.folder / "start.log").read_text(errors="replace").strip().splitlines()[-8:]
                problem = f"ended with status {process.returncode}" if process.poll() is not None else "did not answer"
                raise ClusterError(
                    f"The local Ray cluster {problem} within {timeout_s:.0f} s. Run `tandem doctor`. Ray said:\n"
                    + "\n".join(last_lines)
                )
            time.sleep(0.2)

    def _export_environment(self) -> None:
        """Connect Ray in this process to this cluster, whether Ray has been imported or not."""
        environment.export(self.environment, override=True)
        _set_loopback(LOOPBACK.items() <= self.environment.items())

    def stop(self) -> None:
        """End every process of the cluster and remove its files. Safe to call twice, and after a signal."""
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(self.pid).terminate()
        end_marked_processes(self.mark)
        if self.reaper is not None:
            self.reaper.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        remove_private_folder(self.folder)
        with contextlib.suppress(UnsafePathError):
            if (record := recorded_cluster()) and record.mark == self.mark:
                _existing_record_path().unlink(missing_ok=True)
        for name, value in self.environment.items():
            environment.forget(name, value)
        _set_loopback(False)


@contextlib.contextmanager
def local_cluster(*, num_cpus: int | None = None) -> Iterator[LocalCluster]:
    """A local cluster for the length of a `with` block."""
    cluster = LocalCluster.start(num_cpus=num_cpus)
    try:
        yield cluster
    finally:
        cluster.stop()


def record_path() -> Path:
    """File that describes this user's local cluster to later commands; users who share a home have one each."""
    return environment.settings().root / f"cluster-{os.geteuid()}.json"


def _existing_record_path() -> Path:
    """The record's path, or `cluster.json`, its earlier name, if this user has a record there only."""
    path, old_path = record_path(), environment.settings().root / "cluster.json"
    with contextlib.suppress(OSError):
        if not os.path.lexists(path) and old_path.lstat().st_uid == os.geteuid():
            return old_path
    return path


def recorded_cluster() -> LocalCluster | None:
    """This user's local cluster by its record in this home, whether the cluster still answers or not.

    Raises UnsafePathError if another user owns the record or can change it: it names programs to execute and an address that
    gets the token.
    """
    try:
        record = json.loads(read_private_file(_existing_record_path()))
        return LocalCluster(
            address=record["address"],
            dashboard_url=record["dashboard_url"],
            mark=record["environment"][MARK],
            folder=Path(record["folder"]),
            pid=record["pid"],
            environment=record["environment"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def running_cluster() -> LocalCluster | None:
    """The local cluster of this home, if it runs; exports the environment variables that Ray calls need.

    Raises UnsafePathError if another user can reach its folder.
    """
    cluster = recorded_cluster()
    # The token must not go to the port of a cluster that has ended: another user may listen there now.
    if cluster is None or not _is_alive(cluster):
        return None
    if not dashboard_answers(cluster.dashboard_url, cluster.environment.get("RAY_AUTH_TOKEN_PATH")):
        return None
    check_private_folder(cluster.folder)
    cluster._export_environment()
    return cluster


def _is_alive(cluster: LocalCluster) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return psutil.Process(cluster.pid).environ().get(MARK) == cluster.mark
    return False


def _remove_dead_cluster() -> None:
    """Remove the files of the recorded cluster if all of its processes have ended, such as by SIGKILL."""
    dead = recorded_cluster()
    if dead is not None and not marked_processes(dead.mark):
        remove_private_folder(dead.folder)


def connect(address: str | None = None) -> Cluster | None:
    """The cluster at `address` or RAY_ADDRESS, else the local one of this home, else None.

    Raises ClusterError when an address is given and nothing answers there.
    """
    address = address or environment.settings().ray_address
    if not address or address == "local":
        return running_cluster()
    environment.export(authentication())
    if address.startswith(("http://", "https://")):
        if not dashboard_answers(address, environment.variable("RAY_AUTH_TOKEN_PATH")):
            raise ClusterError(
                f"No Ray dashboard answers at {address}. Check RAY_ADDRESS, the tunnel and the token (~/.ray/auth_token), "
                "or unset RAY_ADDRESS to use this machine."
            )
        return Cluster(dashboard_url=address.rstrip("/"))
    if only_on_loopback(address):
        environment.export(LOOPBACK, override=True)
        _set_loopback(True)
    from ray.dashboard.utils import get_address_for_submission_client

    try:
        return Cluster(dashboard_url=get_address_for_submission_client(address), address=address)
    except Exception as error:  # Ray raises many kinds here
        raise ClusterError(
            f"No Ray cluster answers at RAY_ADDRESS={address}: {error}. Start one with `ray start --head`, "
            "or unset RAY_ADDRESS to use this machine."
        ) from error


def only_on_loopback(address: str) -> bool:
    """Whether a server at `host:port` listens on 127.0.0.1, and not on the address of this machine's network interface.

    A local cluster of Tandem's does, and one of `ray start` does not, where Ray takes the interface's address for loopback.
    """
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdecimal():
        return False
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # of UDP: nothing is sent
            interface = str(probe.getsockname()[0])
    except OSError:
        return False
    return _listens("127.0.0.1", int(port)) and not _listens(interface, int(port))


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=3):
            return True
    except OSError:
        return False


def _set_loopback(enabled: bool) -> None:
    """Set Ray's constant for the variable of LOOPBACK, which Ray reads only when it is imported."""
    constants: Any = sys.modules.get("ray._private.ray_constants")
    if constants is not None and hasattr(constants, "ENABLE_RAY_CLUSTER"):
        constants.ENABLE_RAY_CLUSTER = not enabled


def authentication() -> dict[str, str]:
    """Environment of Ray's token mode, with the token in the user's home, which is created if missing."""
    mode = environment.variable("RAY_AUTH_MODE")
    if mode and mode != "token":
        return {}
    if environment.variable("RAY_AUTH_TOKEN"):
        return {"RAY_AUTH_MODE": "token"}
    token = Path(environment.variable("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token.exists():
        make_private_folder(token.parent)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


def dashboard_answers(url: str, token_path: str | None) -> bool:
    """Whether a Ray dashboard answers at `url`."""
    request = urllib.request.Request(f"{url.rstrip('/')}/api/version")
    token = environment.variable("RAY_AUTH_TOKEN")
    if not token and token_path and Path(token_path).exists():
        token = Path(token_path).read_text().strip()
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def object_store_bytes() -> int:
    """A tenth of the memory, at most 2 GiB and half of /dev/shm: batches of tokens are small."""
    limit = min(2 * 2**30, psutil.virtual_memory().total // 10)
    with contextlib.suppress(OSError):
        limit = min(limit, shutil.disk_usage("/dev/shm").free // 2)
    return max(limit, 100 * 2**20)
