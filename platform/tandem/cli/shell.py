"""What every command shares: the console, errors as one clear message, signals, and a cluster to work on."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from tandem.cluster import Cluster, LocalCluster, connect, recorded
from tandem.errors import ClusterError, TandemError
from tandem.private import check_home
from tandem.settings import export, forget, settings, variable

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

INTERRUPTED = 130
CORE_LEVEL = "RAY_BACKEND_LOG_LEVEL"
AGAIN_S = 1.0
"""How soon an interrupt that was lost is raised again."""


@contextlib.contextmanager
def friendly_errors() -> Iterator[None]:
    """Show a TandemError as one message and leave with its status; a Ctrl-C leaves with 130 and no traceback.

    Every command starts here, so TANDEM_HOME is created or checked here too.
    """
    before = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if warning := check_home(settings().root):
            errors.print(f"[yellow]Warning[/] {escape(warning)}", soft_wrap=True)
        yield
    except TandemError as error:
        fail(error)
    except KeyboardInterrupt:
        interrupt_taken()
        # What is pressed once more while the interpreter ends would kill it then, and the status be another.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        # Where an interrupt went through an extension module that runs Python code (imports do), `python -m` would end by the
        # signal all the same, whatever was made of it. Running anything in that way takes the note back.
        ctypes.pythonapi.PyRun_SimpleString(b"")
        errors.print("[yellow]Interrupted.[/]")
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python must not complain of it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    finally:
        interrupt_taken()
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt_taken() -> None:
    """Say that a KeyboardInterrupt has been seen to; otherwise it is raised again until somebody does."""
    if signal.getsignal(signal.SIGALRM) is _leave_again:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind. Python drops what is raised in a finalizer, and libraries drop more, so it is raised again if it was lost."""
    signal.signal(signal.SIGALRM, _leave_again)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _leave_again(number: int, frame: FrameType | None) -> None:
    # What runs while the first one unwinds is clean-up.
    if not isinstance(sys.exc_info()[1], KeyboardInterrupt | SystemExit):
        raise KeyboardInterrupt


def fail(error: TandemError) -> NoReturn:
    """Print what went wrong, and leave with the error's status."""
    errors.print(f"[bold red]Error[/] {escape(str(error))}", soft_wrap=True)
    raise SystemExit(error.exit_code)


@contextlib.contextmanager
def a_cluster(*, num_cpus: int | None = None, keep: bool = False) -> Iterator[Cluster]:
    """The cluster of RAY_ADDRESS or of this home; else a local one, stopped at the end of the block.

    With `keep` it stays, unless the block raises.
    """
    cluster = connect()
    if cluster is not None:
        yield cluster
        return
    stale = recorded()
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
        up = recorded() if started is None else started
        if not keep and up is not None and up != stale:
            stop_quietly(up)


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


@contextlib.contextmanager
def connected(cluster: Cluster, *, other: str) -> Iterator[None]:
    """This process as a driver of a cluster for the length of a block.

    `other`: what works where the cluster's address is not known, for the ClusterError that is raised then.
    """
    import ray

    if cluster.address is None:
        raise ClusterError(
            f"The cluster is known only by its dashboard, {cluster.dashboard_url}. Give RAY_ADDRESS as host:port, or {other}."
        )
    handler = signal.getsignal(signal.SIGTERM)
    with quiet_driver():
        ray.init(
            address=cluster.address,
            namespace="tandem",
            log_to_driver=False,
            logging_level=logging.ERROR,
            ignore_reinit_error=True,
        )
    if callable(handler) and threading.current_thread() is threading.main_thread():
        # Ray has set its own, which ends the process without a word.
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        with uninterrupted():
            ray.shutdown()


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
