"""Connection to the Ray cluster of RAY_ADDRESS or of this home, or to a local one started for a block."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

from tandem.cluster.local import Cluster, LocalCluster, connect, recorded_cluster
from tandem.cluster.machine import gpus
from tandem.errors import ClusterError
from tandem.sdk.console import console
from tandem.settings import export, forget, variable

CORE_LEVEL = "RAY_BACKEND_LOG_LEVEL"


@contextlib.contextmanager
def open_cluster(*, num_cpus: int | None = None, keep: bool = False) -> Iterator[Cluster]:
    """The cluster of RAY_ADDRESS or of this home; else a local one, stopped at the end of the block.

    With `keep` it stays, unless the block raises.
    """
    cluster = connect()
    if cluster is not None:
        yield cluster
        return
    stale = recorded_cluster()
    started: LocalCluster | None = None
    try:
        with console.status("Starting a local Ray cluster"):
            started = LocalCluster.start(num_cpus=num_cpus, keep=keep)
        yield started
    except BaseException:
        # What was to stay has nothing on it that works.
        keep = False
        raise
    finally:
        # An interrupt may have come when it was up and not yet handed over: then it is known by its record.
        up = recorded_cluster() if started is None else started
        if not keep and up is not None and up != stale:
            stop_quietly(up)


def check_gpus(needed: float, what: str, setting: str) -> None:
    """ClusterError if `what` (`the job`) needs more GPUs than this machine has and no cluster is up, before one is started.

    On a cluster that is up, the job or app checks the cluster's resources itself.
    """
    if not needed or connect() is not None:
        return
    here = len(gpus())
    if needed > here:
        raise ClusterError(
            f"{what} needs {needed:g} GPUs, and this machine has {here}. Lower {setting}, or set RAY_ADDRESS to a "
            "cluster with GPUs."
        )


@contextlib.contextmanager
def quiet_driver() -> Iterator[None]:
    """For `ray.init` in a block: what Ray's C++ core of this process says goes to its log file alone.

    It writes its errors on stderr too, though they tell of what Ray does about them by itself. Processes that are started
    later keep their own level.
    """
    if variable(CORE_LEVEL) is not None:
        yield
        return
    export({CORE_LEVEL: "fatal"})
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        # With a level of its own it begins by saying so, on stderr.
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
        forget(CORE_LEVEL, "fatal")


def stop_quietly(cluster: Cluster) -> None:
    """Stop a cluster whole, whatever more is pressed meanwhile."""
    with uninterrupted(), console.status("Stopping"):
        cluster.stop()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold off Ctrl-C and SIGTERM for the length of a block, so that a clean-up is done to its end."""
    held = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def connected(cluster: Cluster) -> Iterator[None]:
    """Connect this process to a cluster as a driver, for the length of a block."""
    import ray

    if cluster.address is None:
        raise ClusterError(
            f"The cluster is known only by its dashboard, {cluster.dashboard_url}. Run the command on one of its nodes, or give "
            "RAY_ADDRESS as host:port."
        )
    handler = signal.getsignal(signal.SIGTERM)
    quiet_serve()
    with quiet_driver():
        ray.init(
            address=cluster.address,
            namespace="tandem",
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    if callable(handler) and threading.current_thread() is threading.main_thread():
        # Ray replaces the handler by one that ends the process without a message.
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        with uninterrupted():
            ray.shutdown()


def quiet_serve() -> None:
    """Keep Serve's informational messages out of the terminal."""
    # Its logger is configured when it is imported: what was set before is lost.
    from ray import serve  # noqa: F401

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
