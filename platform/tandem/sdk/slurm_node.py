"""One node of a Slurm job: Ray on it, and on the first one the job's command.

Every task of the batch script's step runs this. The first task starts Ray's head and says where it is in the job's folder; the
others join it and end when the first one has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime

from tandem.cluster import node
from tandem.cluster.local import object_store_bytes
from tandem.cluster.ports import free_ports
from tandem.cluster.slots import hold_slot
from tandem.cluster.slurm import commands
from tandem.cluster.slurm.folder import HEARTBEAT_S, TIME_LIMIT, Connection, Head, JobFolder, Submission
from tandem.cluster.slurm.script import REQUEUE_STATUS, RUNTIME_PREFIX
from tandem.errors import ClusterError, TandemError
from tandem.sdk.slurm_app import check_port_free, is_ready, models
from tandem.sdk.slurm_key import job_end, make_key, revoke_key
from tandem.serve.listen import is_loopback
from tandem.settings import child_environment, settings, variable

JOIN_S = 300.0
"""Seconds within which a job's nodes have to find each other: the first container start on a node takes minutes."""
POLL_S = 0.5
START_AGAIN_S = 2.0
"""Seconds before a node that could not join tries again."""
HAND_OVER_S = 10.0
"""Seconds for which an app that is told to end takes new requests still if another one succeeds it: tunnels change meanwhile."""
CANCEL_S = 3.0
"""Seconds that the command gets to end by itself after a cancellation."""


def run_node(folder: JobFolder) -> int:
    """Run this task's part of the job; returns its exit status. The job's runtime folder is removed, unless it has failed."""
    status = _run_head(folder) if int(variable("SLURM_PROCID") or 0) == 0 else _run_worker(folder)
    own = settings().runtime_dir
    # After a failure Ray's logs are of use.
    if status in (0, REQUEUE_STATUS) and own is not None and own.name.startswith(RUNTIME_PREFIX):
        node.stop(remove=True)
    return status


def _cancellation() -> threading.Event:
    """Set by SIGTERM: the job was cancelled, or its time is over."""
    cancelled = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: cancelled.set())
    return cancelled


def _run_head(folder: JobFolder) -> int:
    submission, run, cancelled = folder.submission(), run_id(), _cancellation()
    folder.write_connection(Connection(job_id=_job_id(), state="starting"))
    try:
        host = node_address()
        (port,) = free_ports(1)
        address = f"{host}:{port}"
        with _slot(submission) as slot:
            node.start(["--head", f"--port={port}", f"--node-ip-address={host}", *_resources(submission)], slot=slot)
            try:
                folder.write_head(Head(run=run, address=address))
                _wait_for_nodes(address, submission.nodes, cancelled)
                return _run_command(folder, submission, host, address, cancelled)
            finally:
                folder.write_head(Head(run=run, address=""))
                node.stop()
    except BaseException as error:
        # Whatever ends the run: clients and `submit` wait for a state.
        message = str(error) or type(error).__name__
        folder.write_connection(Connection(job_id=_job_id(), state="failed", message=message))
        raise


def _run_worker(folder: JobFolder) -> int:
    submission, run, cancelled = folder.submission(), run_id(), _cancellation()
    head = _wait_for_head(folder, run, cancelled)
    if head is None:
        return 0
    deadline = time.monotonic() + JOIN_S
    words = [f"--address={head.address}", f"--node-ip-address={node_address()}", *_resources(submission)]
    said = ""
    with _slot(submission) as slot:
        while True:
            try:
                node.start(words, slot=slot)
                break
            except ClusterError as error:
                if time.monotonic() > deadline or cancelled.is_set() or _has_ended(folder, run):
                    raise
                if str(error) != said:
                    said = str(error)
                    print(f"This node could not join the job's first one, and tries again: {said}", file=sys.stderr)
                time.sleep(START_AGAIN_S)
        try:
            while not cancelled.is_set() and not _has_ended(folder, run):
                if not node.is_running():
                    raise ClusterError(
                        f"Ray has ended on {socket.gethostname()}; its log is in {node.runtime_folder()}."
                    )
                time.sleep(POLL_S)
        finally:
            node.stop()
    return 0


def _run_command(folder: JobFolder, submission: Submission, host: str, address: str, cancelled: threading.Event) -> int:
    """Run the job's command until it ends, or is told to; an app with a key of the job's own."""
    connection = Connection(job_id=_job_id(), state="starting", node=host, port=submission.port)
    if (end := job_end(_known_job(), submission)) is not None:
        connection = replace(connection, ends_at=end.isoformat(timespec="seconds"))
    if not submission.serves:
        return _watch_command(folder, submission, connection, address, cancelled)
    check_port_free(host, submission.port)
    # Before the app: it refuses to listen to other machines without a key.
    new = make_key(_job_id(), end)
    connection = replace(connection, api_key=new.secret, api_key_id=new.key.id)
    try:
        return _watch_command(folder, submission, connection, address, cancelled)
    finally:
        with contextlib.suppress(TandemError):
            connection = replace(connection, successor=folder.connection().successor)
        revoke_key(connection)


def _watch_command(
    folder: JobFolder, submission: Submission, connection: Connection, address: str, cancelled: threading.Event
) -> int:
    words = list(submission.command)
    if submission.serves:
        words += ["--host", connection.node, "--port", str(connection.port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tandem", *words],
        stdin=subprocess.DEVNULL,
        env=child_environment({"RAY_ADDRESS": address}),
        start_new_session=True,
    )
    beaten_at = time.monotonic()
    try:
        while process.poll() is None and not cancelled.is_set() and folder.stop_reason(run_id()) is None:
            if connection.state == "starting" and (ready := _ready(connection, submission, process)) is not None:
                connection = ready
                folder.write_connection(connection.beating(datetime.now(UTC)))
                if submission.succeeds:
                    JobFolder(folder.path.parent / submission.succeeds).write_successor(connection.job_id)
            elif connection.state == "ready" and time.monotonic() - beaten_at >= HEARTBEAT_S:
                beaten_at = time.monotonic()
                # A file system that is full or away for a moment does not end the job.
                with contextlib.suppress(OSError):
                    folder.write_connection(connection.beating(datetime.now(UTC)))
            time.sleep(POLL_S)
        if process.poll() is None:
            folder.write_connection(replace(connection, state="ended" if cancelled.is_set() else "ending"))
            if submission.serves and folder.connection().successor:
                cancelled.wait(HAND_OVER_S)
            requeue = not submission.serves and folder.stop_reason(run_id()) == TIME_LIMIT
            status = _end_command(process, submission, address, cancelled, requeue=requeue)
            folder.write_connection(replace(connection, state="ended"))
            return status
    finally:
        _kill(process)
    status = process.returncode
    message = "" if status == 0 else f"`tandem {' '.join(words[:2])}` ended with status {status}; see {folder.log}."
    folder.write_connection(replace(connection, state="failed" if status else "ended", message=message))
    return status


def _ready(connection: Connection, submission: Submission, process: subprocess.Popen[bytes]) -> Connection | None:
    """The connection of a command that runs, of an app that answers; None: not yet. The key is sent to the job's app alone."""
    if not submission.serves:
        return replace(connection, state="ready")
    # The order matters: what answers was this user's, and the app had not ended.
    if not is_ready(connection.node, connection.port) or process.poll() is not None:
        return None
    names = models(connection.node, connection.port, connection.api_key)
    return None if names is None else replace(connection, state="ready", models=names)


def _known_job() -> commands.JobState | None:
    """What Slurm says of this job; None where this container has no `scontrol`, or the controller does not answer."""
    with contextlib.suppress(ClusterError):
        return commands.state(_job_id()) if commands.available() else None
    return None


def _end_command(
    process: subprocess.Popen[bytes],
    submission: Submission,
    address: str,
    cancelled: threading.Event,
    *,
    requeue: bool,
) -> int:
    """End the command: an app ends its streams first; training writes a checkpoint. Returns the status for the batch script.

    After a cancellation Slurm has sent SIGTERM to every process of the step, Ray's too, and kills them within 30 s.
    """
    if not submission.serves and not cancelled.is_set():
        stop_words = [sys.executable, "-m", "tandem", "train", "stop", "--all"]
        subprocess.run(stop_words, env=child_environment({"RAY_ADDRESS": address}), check=False)
    else:
        process.send_signal(signal.SIGTERM)
    while process.poll() is None and not cancelled.is_set():
        time.sleep(POLL_S)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(CANCEL_S)
    # It may have reached its last step meanwhile.
    return REQUEUE_STATUS if requeue and process.returncode != 0 else 0


def run_id() -> str:
    """Slurm's id of this job and the number of its restarts."""
    return f"{_job_id()}.{variable('SLURM_RESTART_COUNT') or 0}"


def _job_id() -> str:
    job_id = variable("SLURM_JOB_ID")
    if job_id is None:
        raise ClusterError("SLURM_JOB_ID is not set: this runs in jobs that `tandem slurm submit` has submitted.")
    return job_id


def node_address() -> str:
    """The address by which the other nodes of the job reach this one."""
    name = variable("SLURMD_NODENAME") or socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        if not is_loopback(address):
            return address
    # Names of nodes often mean loopback on the node itself. A route to the node that started the step shows the right interface.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((variable("SLURM_LAUNCH_NODE_IPADDR") or "192.0.2.1", 9))
        return str(probe.getsockname()[0])


def _resources(submission: Submission) -> list[str]:
    """Options of `ray start` with what Slurm has given this node."""
    cpus = variable("SLURM_CPUS_PER_TASK") or variable("SLURM_CPUS_ON_NODE")
    found = [f"--num-cpus={cpus}"] if cpus else []
    if submission.kind == "sweep":
        # Ray would take a third of the memory, and so would each task that shares the node.
        found.append(f"--object-store-memory={object_store_bytes()}")
    return [*found, f"--num-gpus={submission.gpus_per_node}"]


def _slot(submission: Submission) -> AbstractContextManager[int | None]:
    """Holds one of the port spaces of a machine for the node (see `node.start`); None for an app, which has the machine's own."""
    # Jobs that run at the same time have numbers that are near each other.
    return contextlib.nullcontext() if submission.serves else hold_slot(int(_job_id()))


def _wait_for_nodes(address: str, count: int, cancelled: threading.Event) -> None:
    """Wait until all nodes of the job have joined; ClusterError after `JOIN_S`."""
    if count == 1:
        return
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        deadline = time.monotonic() + JOIN_S
        while (alive := sum(bool(each["Alive"]) for each in ray.nodes())) < count:
            if cancelled.is_set() or time.monotonic() > deadline:
                raise ClusterError(
                    f"{alive} of {count} nodes have joined within {JOIN_S:g} s; the job's output says why."
                )
            time.sleep(POLL_S)
    finally:
        ray.shutdown()


def _wait_for_head(folder: JobFolder, run: str, cancelled: threading.Event) -> Head | None:
    """The first node of this run; None: the run has ended already. ClusterError after `JOIN_S`."""
    deadline = time.monotonic() + JOIN_S
    while not cancelled.is_set():
        head = folder.head()
        if head is not None and head.run == run:
            return head if head.address else None
        if time.monotonic() > deadline:
            raise ClusterError(
                f"The job's first node has not started Ray within {JOIN_S:g} s; the job's output says why."
            )
        time.sleep(POLL_S)
    return None


def _has_ended(folder: JobFolder, run: str) -> bool:
    head = folder.head()
    return head is None or head.run != run or not head.address


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the command and all that it has started, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
