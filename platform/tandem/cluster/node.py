"""Ray nodes: `ray start` with the environment that serving and token authentication need.

`ray up`, Slurm scripts and people run `tandem node start` where they would run `ray start`; every other option is Ray's own.
The node's files are below one private folder of this machine, `runtime_folder()`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from tandem import settings as environment
from tandem.cluster import haproxy
from tandem.cluster.local import authentication
from tandem.cluster.marks import MARK, end_marked_processes, marked_processes
from tandem.cluster.ports import free_block, free_ports
from tandem.cluster.reaper import KEEP_MARKS
from tandem.errors import ClusterError, ConfigError, UnsafePathError
from tandem.private import check_private_folder, make_private_folder, read_private_file, remove_private_folder
from tandem.storage import write_atomic

HAPROXY_PORTS = [8406, 8404, 8500, 9500]
"""HAProxy's metrics and statistics, and the HTTP and gRPC ports of Serve's fallback proxy, on every node."""
GATEWAY_PORTS = range(30000, 31000)
"""Ports of gateway replicas, on every node: outside of those that Ray gives to its workers."""
WORKER_PORTS = range(10000, 20000)
"""Ports of Ray's workers, Ray's own range; nodes in slots share it, so that none takes a port that another is about to take."""
SLOTS = 20
"""Nodes that fit on a machine side by side, if none of them serves."""
START_TIMEOUT_S = 180.0
WATCH_S = 1.0
"""Seconds between checks of the raylet."""


def runtime_folder() -> Path:
    """The private folder of this user on this machine: TANDEM_RUNTIME_DIR, else /tmp/tandem-UID. Made with mode 0700.

    Short, because Unix sockets lie below it and their paths have at most 107 bytes. UnsafePathError if it belongs to another user
    or others may reach it: its files cannot be trusted then.
    """
    folder = environment.settings().runtime_dir or Path(f"/tmp/tandem-{os.getuid()}")
    try:
        make_private_folder(folder)
        check_private_folder(folder)
    except (UnsafePathError, FileExistsError) as error:
        raise UnsafePathError(f"{error} Or set TANDEM_RUNTIME_DIR to a folder of your own, on this machine.") from error
    return folder


def start(arguments: Sequence[str], *, slot: int | None = None) -> None:
    """Run `ray start` with `arguments`. ClusterError if this user runs a node here already, which keeps running.

    A node that serves has HAProxy's ports, which are the same on all nodes of its cluster; a machine has room for one. With a
    `slot` (0 to SLOTS - 1) the node has others: nodes that do not serve fit on a machine side by side, each in a slot and a
    TANDEM_RUNTIME_DIR of its own.

    With `--block` it returns when the node has ended. ClusterError with the end of Ray's output if it fails, if this machine is
    to join a cluster and has no token for it, or if its ports are taken.
    """
    # Ray's own --block would wait in the process that has a time limit here.
    block, arguments = "--block" in arguments, [argument for argument in arguments if argument != "--block"]
    address = option(arguments, "--address")
    if ("--head" in arguments) == (address is not None):
        raise ConfigError("Say either --head to start a cluster, or --address HOST:PORT of the head to join one.")
    if (port := option(arguments, "--port")) is not None and not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"--port is {port!r}; it must be a whole number from 1 to 65535.")
    if address is not None:
        require_token()
        check_address(address)
    check_filled_in()
    mark = secrets.token_hex(8)
    with _lock_node() as folder:
        if is_running():
            raise ClusterError(
                "A node of this user runs on this machine. `tandem node stop` ends it, and all that runs on it."
            )
        _end_recorded()  # files and processes of a node that has died
        if slot is None:
            check_ports()
        _start(folder, mark, arguments, slot)
    if block:
        try:
            watch(mark)
        finally:
            _end(mark)
        return
    subprocess.Popen(
        [sys.executable, "-m", "tandem.cluster.node", mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def slot_options(slot: int, *, head: bool) -> list[str]:
    """Options of `ray start` that keep a node's ports apart from those of nodes in other slots of the machine."""
    first = WORKER_PORTS.start + slot * (len(WORKER_PORTS) // SLOTS)
    ports = free_ports(3)
    found = [f"--min-worker-port={first}", f"--max-worker-port={first + len(WORKER_PORTS) // SLOTS - 1}"]
    found.append(f"--dashboard-agent-listen-port={ports[0]}")
    return [*found, f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"] if head else found


def cluster_address(arguments: Sequence[str]) -> str | None:
    """HOST:PORT of the cluster of which a head's options make it the head; None where they do not say both."""
    host, port = option(arguments, "--node-ip-address"), option(arguments, "--port")
    return f"{host}:{port}" if host and port else None


def _start(folder: Path, mark: str, arguments: Sequence[str], slot: int | None) -> None:
    haproxy_ports, gateway_ports, address = HAPROXY_PORTS, GATEWAY_PORTS, None
    if slot is not None:
        # Where a machine has several clusters, Ray's processes do not guess which is theirs (Ray Train's do elsewhere).
        address = option(arguments, "--address") or cluster_address(arguments)
        haproxy_ports, gateway_ports = free_ports(len(HAPROXY_PORTS)), free_block()
        arguments = [*arguments, *slot_options(slot, head="--head" in arguments)]
    variables = {
        **haproxy.serving_environment(folder, haproxy_ports, gateway_ports),
        **authentication(),
        **KEEP_MARKS,
        MARK: mark,
        "RAY_TMPDIR": str(folder / "ray"),
        # Sockets and scratch files of vLLM, torch and multiprocessing too are private then.
        "TMPDIR": str(folder / "tmp"),
    }
    make_private_folder(folder / "tmp")
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--disable-usage-stats",
        f"--temp-dir={folder / 'ray'}",
    ]
    write_atomic(_record(folder), json.dumps({"mark": mark}), mode=0o600)
    try:
        result = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment.child_environment({**variables, "RAY_ADDRESS": address}),
            timeout=START_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        _end_recorded()
        raise ClusterError(
            f"`ray start` did not end within {START_TIMEOUT_S:.0f} s. Check that the head's address can be reached from here."
        ) from error
    if result.returncode:
        _end_recorded()
        last_lines = "\n".join(result.stdout.strip().splitlines()[-12:])
        raise ClusterError(f"`ray start` ended with status {result.returncode}. Ray said:\n{last_lines}")


def is_running() -> bool:
    """Whether Ray runs on the node that this user has started here."""
    mark = _recorded_mark()
    return mark is not None and any(_is_raylet(process) for process in marked_processes(mark))


def watch(mark: str) -> None:
    """Wait until the node's raylet has ended, and end the processes that outlive it, such as HAProxy and engines."""
    raylets = [process for process in marked_processes(mark) if _is_raylet(process)]
    while any(_is_raylet(raylet) for raylet in raylets):
        time.sleep(WATCH_S)
    with _lock_node():
        _end(mark)


def stop() -> int:
    """End every process of the node that this user started here; returns how many there were. Ray's logs stay."""
    with _lock_node():
        return _end_recorded()


@contextlib.contextmanager
def _lock_node() -> Iterator[Path]:
    """The runtime folder, locked for a `with` block: no other process starts or ends the node meanwhile."""
    folder = runtime_folder()
    with (folder / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _is_raylet(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end_recorded() -> int:
    mark = _recorded_mark()
    if mark is None:
        return 0
    count = len(marked_processes(mark))
    _end(mark)
    return count


def _end(mark: str) -> None:
    """End all processes with `mark`, and remove the node's scratch files and record unless another one has been started since."""
    end_marked_processes(mark)
    if _recorded_mark() == mark:
        folder = runtime_folder()
        remove_private_folder(folder / "tmp")
        _record(folder).unlink(missing_ok=True)


def _recorded_mark() -> str | None:
    """The mark of the node that was started here last and has not been ended."""
    try:
        return str(json.loads(read_private_file(_record(runtime_folder())))["mark"])
    except (OSError, ValueError, KeyError):
        return None


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`; empty where there is none after the name, None without the name."""
    for index, argument in enumerate(arguments):
        if argument == name:
            return arguments[index + 1] if index + 1 < len(arguments) else ""
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def check_address(address: str) -> None:
    """Refuse an invalid address, or a host name that this machine cannot resolve: Ray would try it for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--address is {address!r}; it must be HOST:PORT of the head, such as 10.0.0.1:6379.")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (socket.gaierror, OverflowError) as error:
        raise ClusterError(
            f"--address is {address!r}, and {host} cannot be resolved on this machine ({error})."
        ) from error


def check_filled_in() -> None:
    """Refuse an environment that still has the placeholders of deploy/tandem.env.example."""
    for name, value in (
        ("TANDEM_HOME", environment.settings().home),
        ("TANDEM_DATABASE_URL", environment.settings().database_url),
    ):
        if "<" in str(value or ""):
            raise ConfigError(
                f"{name} still has a placeholder (<...>). Fill in deploy/tandem.env, and start the node again."
            )


def check_ports() -> None:
    """Refuse a machine where another user's node has the ports that HAProxy is to have."""
    for port in HAPROXY_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise ClusterError(
                    f"Port {port} of this machine is taken, perhaps by a node of another user; a machine has room for one node. "
                    "`ss -ltnp` shows who has it."
                ) from error


def require_token() -> None:
    """Refuse to join a cluster without its token: Ray would make another one here, and the head would refuse the node."""
    mode = environment.variable("RAY_AUTH_MODE")
    if (mode and mode != "token") or environment.variable("RAY_AUTH_TOKEN"):
        return
    path = Path(environment.variable("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        raise ClusterError(
            f"{path} is not here. Copy the head's token to it (in cluster.yaml by file_mounts), with mode 0600."
        )


def _record(folder: Path) -> Path:
    return folder / "node.json"


if __name__ == "__main__":
    watch(sys.argv[1])
