"""Ray nodes: `ray start` with the environment that serving and token authentication need.

`ray up`, Slurm scripts and people run `tandem node start` where they would run `ray start`; every other option is Ray's own.
The node's files are below one private folder of this machine, `runtime_folder()`.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from tandem import settings as environment
from tandem.cluster import haproxy
from tandem.cluster.local import LOOPBACK, authentication
from tandem.cluster.marks import MARK, end_marked_processes, marked_processes
from tandem.cluster.node_checks import (
    check_address,
    check_durable,
    check_filled_in,
    check_ports,
    check_restart,
    option,
    require_token,
)
from tandem.cluster.ports import free_block, free_ports
from tandem.cluster.reaper import KEEP_MARKS
from tandem.errors import ClusterError, ConfigError, TandemError, UnsafePathError
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
"""Seconds between checks of the node's processes."""
APPEAR_S = 5.0
"""Seconds in which a process that was just started may not have its name yet."""
SETTLED_S = 60.0
"""Seconds after which a node that ends is started again at once; one that lived for less waits longer each time."""
LOG, MAX_LOG_BYTES = "node.log", 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningNode:
    """A node that was started here."""

    mark: str
    """The mark of its processes (`cluster.marks`)."""
    arguments: tuple[str, ...]
    """Of `ray start`."""
    restart: bool
    """Whether it is started again when it ends by itself."""
    slot: int | None = None
    """Its place beside other nodes of the machine that do not serve; None: it has HAProxy's own ports."""


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

    With `--block` it returns when the node has ended, with `--restart` a node that has ended by itself is started again until
    `stop` (`supervise`). ClusterError with the end of Ray's output if it fails, if this machine is
    to join a cluster and has no token for it, or if its ports are taken.
    """
    # Ray's own --block would wait in the process that has a time limit here.
    block, restart = "--block" in arguments, "--restart" in arguments
    arguments = [argument for argument in arguments if argument not in ("--block", "--restart")]
    address = option(arguments, "--address")
    if ("--head" in arguments) == (address is not None):
        raise ConfigError("Say either --head to start a cluster, or --address HOST:PORT of the head to join one.")
    if (port := option(arguments, "--port")) is not None and not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"--port is {port!r}; it must be a whole number from 1 to 65535.")
    if address is not None:
        require_token()
        check_address(address)
    check_filled_in()
    for name, value in LOOPBACK.items():
        # From a process that had a local cluster. With it, Ray lets no other node in.
        environment.forget(name, value)
    if restart and address is None:
        check_durable()
    node = RunningNode(mark=secrets.token_hex(8), arguments=tuple(arguments), restart=restart, slot=slot)
    with _lock_node() as folder:
        if is_running():
            raise ClusterError(
                "A node of this user runs on this machine. `tandem node stop` ends it, and all that runs on it."
            )
        _end_recorded()  # files and processes of a node that has died
        if slot is None:
            check_ports(HAPROXY_PORTS)
        _start(folder, node)
    if block:
        try:
            supervise(node)
        finally:
            stop()
        return
    subprocess.Popen(
        [sys.executable, "-m", "tandem.cluster.node", node.mark],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def worker_ports(slot: int) -> range:
    """The ports of Ray's workers on the node in a slot."""
    count = len(WORKER_PORTS) // SLOTS
    return WORKER_PORTS[slot * count : (slot + 1) * count]


def slot_options(slot: int, *, head: bool) -> list[str]:
    """Options of `ray start` that keep a node's ports apart from those of nodes in other slots of the machine."""
    of_workers, ports = worker_ports(slot), free_ports(3)
    found = [f"--min-worker-port={of_workers[0]}", f"--max-worker-port={of_workers[-1]}"]
    found.append(f"--dashboard-agent-listen-port={ports[0]}")
    return [*found, f"--dashboard-port={ports[1]}", f"--ray-client-server-port={ports[2]}"] if head else found


def cluster_address(arguments: Sequence[str]) -> str | None:
    """HOST:PORT of the cluster of which a head's options make it the head; None where they do not say both."""
    host, port = option(arguments, "--node-ip-address"), option(arguments, "--port")
    return f"{host}:{port}" if host and port else None


def _start(folder: Path, node: RunningNode) -> None:
    haproxy_ports, gateway_ports, arguments, cluster = HAPROXY_PORTS, GATEWAY_PORTS, node.arguments, None
    if node.slot is not None:
        # Where a machine has several clusters, Ray's processes do not guess which is theirs (Ray Train's do elsewhere).
        cluster = option(arguments, "--address") or cluster_address(arguments)
        haproxy_ports, gateway_ports = free_ports(len(HAPROXY_PORTS)), free_block()
        arguments = (*arguments, *slot_options(node.slot, head="--head" in arguments))
    variables = {
        **haproxy.serving_environment(folder, haproxy_ports, gateway_ports),
        **authentication(),
        **KEEP_MARKS,
        MARK: node.mark,
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
    _write_record(folder, node)
    try:
        result = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment.child_environment({**variables, "RAY_ADDRESS": cluster}),
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
    node = _recorded_node()
    return node is not None and any(_is_alive(process, "raylet") for process in marked_processes(node.mark))


def supervise(node: RunningNode) -> None:
    """Wait until the node has ended, and end the processes that outlive it, such as HAProxy and engines.

    With `node.restart` it is then started again, as often as it ends by itself: Ray gives a node up whose network was away for
    longer than its health checks allow, and the raylet ends when it hears of that. Returns when the node was stopped, or
    another one was started.
    """
    pauses = restart_pauses()
    while True:
        started_at = time.monotonic()
        _wait_for_end(node.mark)
        if not node.restart:
            _end_watched(node.mark)
            return
        if time.monotonic() - started_at > SETTLED_S:
            pauses = restart_pauses()
        time.sleep(next(pauses))
        restarted = _restart(node, pauses)
        if restarted is None:
            return
        node = restarted


def _end_watched(mark: str) -> None:
    """End a node's processes and remove its record, unless `stop` has removed the whole folder: it is not made again."""
    folder = environment.settings().runtime_dir
    if folder is None or folder.exists():
        with _lock_node() as folder:
            if folder.exists():
                _end(mark)
                return
    end_marked_processes(mark)


def _wait_for_end(mark: str) -> None:
    """Return when the node's raylet, or its GCS on a head, has ended."""
    deadline = time.monotonic() + APPEAR_S
    while not (watched := _watched(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    while watched and all(_is_alive(process, name) for process, name in watched):
        time.sleep(WATCH_S)


def _watched(mark: str) -> list[tuple[psutil.Process, str]]:
    return [
        (process, name)
        for process in marked_processes(mark)
        for name in ("raylet", "gcs_server")
        if _is_alive(process, name)
    ]


def restart_pauses() -> Iterator[float]:
    """Seconds before the next attempts to start a node again."""
    return itertools.chain((1.0, 2.0, 5.0), itertools.repeat(10.0))


def _restart(node: RunningNode, pauses: Iterator[float]) -> RunningNode | None:
    """Start the node again, trying until that works; None: it was stopped meanwhile, or another node was started."""
    while True:
        with _lock_node() as folder:
            if _recorded_node() != node:
                return None
            end_marked_processes(node.mark)
            try:
                check_restart(node.arguments)
                new = replace(node, mark=secrets.token_hex(8))
                if new.slot is None:
                    check_ports(HAPROXY_PORTS)
                _start(folder, new)
                _log(folder, "The node had ended and has been started again.")
                return new
            except (TandemError, OSError) as error:
                # A failed start has removed it.
                _write_record(folder, node)
                _log(folder, f"The node has ended and does not start yet: {error}")
        time.sleep(next(pauses))


def _log(folder: Path, text: str) -> None:
    """Add a line to the node's log, which is the record of its restarts; a full disk is no reason not to start."""
    with contextlib.suppress(OSError):
        path = folder / LOG
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        with path.open("a") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")


def stop(*, remove: bool = False) -> int:
    """End every process of the node that this user started here; returns how many there were.

    Ray's logs stay, unless `remove`: then the runtime folder goes with all that it holds.
    """
    with _lock_node() as folder:
        count = _end_recorded()
        if remove:
            remove_private_folder(folder)
        return count


@contextlib.contextmanager
def _lock_node() -> Iterator[Path]:
    """The runtime folder, locked for a `with` block: no other process starts or ends the node meanwhile."""
    folder = runtime_folder()
    with (folder / "node.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _is_alive(process: psutil.Process, name: str) -> bool:
    """Whether a process runs and has this name."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.name() == name and process.status() != psutil.STATUS_ZOMBIE
    return False


def _end_recorded() -> int:
    node = _recorded_node()
    if node is None:
        return 0
    count = len(marked_processes(node.mark))
    _end(node.mark)
    return count


def _end(mark: str) -> None:
    """End all processes with `mark`, and remove the node's scratch files and record unless another one has been started since."""
    end_marked_processes(mark)
    node = _recorded_node()
    if node is not None and node.mark == mark:
        folder = runtime_folder()
        remove_private_folder(folder / "tmp")
        _record(folder).unlink(missing_ok=True)


def _recorded_node() -> RunningNode | None:
    """The node that was started here last and has not been stopped."""
    try:
        record = json.loads(read_private_file(_record(runtime_folder())))
        return RunningNode(**{**record, "arguments": tuple(record["arguments"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_record(folder: Path, node: RunningNode) -> None:
    write_atomic(_record(folder), json.dumps(asdict(node)), mode=0o600)


def _record(folder: Path) -> Path:
    return folder / "node.json"


def _main(mark: str) -> None:
    node = _recorded_node()
    # The watcher of a node that another one has replaced meanwhile ends what is left of its own.
    supervise(node if node is not None and node.mark == mark else RunningNode(mark=mark, arguments=(), restart=False))


if __name__ == "__main__":
    _main(sys.argv[1])
